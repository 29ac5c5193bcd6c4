package jwt

import "time"

// Room limits how many tokens the status list has bits for.
func (b *Backend) Room(n int) { b.list.room = n }

// Kept is how long after its token's end an index is not used again.
const Kept = leeway + listLife

// HalfLife is when a list is signed anew though no bit has changed.
const HalfLife time.Duration = listLife / 2
