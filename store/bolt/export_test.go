package bolt

// Stage is where a fault strikes.
type Stage = stage

// The stages.
const (
	BeforeCommit = beforeCommit
	AfterCommit  = afterCommit
)

// WithFault makes f decide what fails. It runs on the writer's goroutine and may block.
func WithFault(c Config, f func(Stage) error) Config {
	c.fault = f
	return c
}

// Waiting is how many updates wait for the writer.
func (l *Ledger) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue)
}

// Seal gives a record as it is stored.
func Seal(key, value string) []byte { return seal(key, []byte(value)) }
