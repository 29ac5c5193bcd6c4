package jwt

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// SetCapacity limits the number of indexes in use on the status list.
func (b *Backend) SetCapacity(n int) { b.list.capacity = n }

// Retention is the time for which an index stays reserved after its token has expired.
const Retention = broker.Leeway + listLife

// HalfLife is the age at which an unchanged list is signed again.
const HalfLife time.Duration = listLife / 2
