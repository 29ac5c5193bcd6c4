package bolt

// Stage is a point of a commit.
type Stage = stage

// The stages.
const (
	BeforeCommit = beforeCommit
	AfterCommit  = afterCommit
)

// WithFault adds f, which returns the error to inject at a stage. It runs on the writer's goroutine and may block.
func WithFault(c Config, f func(Stage) error) Config {
	c.fault = f
	return c
}

// Waiting returns the number of updates in the queue.
func (l *Ledger) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queue) + len(l.urgent)
}

// Seal returns a record in stored form.
func Seal(key, value string) []byte { return seal(key, []byte(value)) }
