package closing

import (
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// TestQueue pushes grants, and checks those that the reader takes.
func TestQueue(t *testing.T) {
	read, reread := &broker.Grant{Purpose: "read"}, &broker.Grant{Purpose: "read again"}
	now := time.Now()
	for name, row := range map[string]struct {
		push [][]Due
		want []Due
	}{
		"one":              {[][]Due{{{ID: "a"}}}, []Due{{ID: "a"}}},
		"several at once":  {[][]Due{{{ID: "a"}, {ID: "b"}}}, []Due{{ID: "a"}, {ID: "b"}}},
		"several pushes":   {[][]Due{{{ID: "a"}}, {{ID: "b"}}}, []Due{{ID: "a"}, {ID: "b"}}},
		"the latest time":  {[][]Due{{{ID: "a"}}, {{ID: "a", At: now}}}, []Due{{ID: "a", At: now}}},
		"most attempts":    {[][]Due{{{ID: "a", attempt: 3}}, {{ID: "a", attempt: 1}}}, []Due{{ID: "a", attempt: 3}}},
		"more attempts":    {[][]Due{{{ID: "a", attempt: 3}}, {{ID: "a", attempt: 4}}}, []Due{{ID: "a", attempt: 4}}},
		"the record stays": {[][]Due{{{ID: "a", grant: read}}, {{ID: "a"}}}, []Due{{ID: "a", grant: read}}},
		"the later record": {[][]Due{{{ID: "a", grant: read}}, {{ID: "a", grant: reread}}},
			[]Due{{ID: "a", grant: reread}}},
		"none": {[][]Due{nil}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			q := newQueue()
			for _, ds := range row.push {
				q.push(ds)
			}
			select {
			case <-q.wake:
				if row.want == nil {
					t.Error("the reader was notified of an empty push")
				}
			default:
				if row.want != nil {
					t.Error("the reader was not notified")
				}
			}
			got := q.take()
			if len(got) != len(row.want) {
				t.Errorf("take() = %v, want %v", got, row.want)
			}
			for _, want := range row.want {
				if got[want.ID] != want {
					t.Errorf("take()[%s] = %+v, want %+v", want.ID, got[want.ID], want)
				}
			}
			if again := q.take(); len(again) != 0 {
				t.Errorf("a second take() = %v, want none", again)
			}
		})
	}
}
