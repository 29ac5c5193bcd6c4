package exec_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/plugins/exec"
)

// FuzzProven checks that an accepted response to prove has one valid outcome for each grant, in the order of the
// request. It compares the response with the result of a lenient decoder.
func FuzzProven(f *testing.F) {
	one, other := broker.GrantID("gr000000000000000000000001"), broker.GrantID("gr000000000000000000000002")
	grants := []broker.Grant{{ID: one, Narrowing: broker.NarrowNative}, {ID: other, Narrowing: broker.NarrowNone}}
	line := func(id broker.GrantID, outcome string) string {
		return `{"grant":"` + string(id) + `","outcome":"` + outcome + `","check":"c","answer":"a"}`
	}
	for _, list := range []string{line(one, "dead") + "," + line(other, "static"), line(one, "static") + "," + line(other, "dead"), line(other, "dead") + "," + line(one, "dead"),
		line(one, "dead"), "", line(one, "alive") + "," + line(other, "unknown"), line(one, "") + "," + line(other, "Dead")} {
		f.Add([]byte(`{"version":1,"evidence":[` + list + `]}`))
	}
	f.Add([]byte(`{"version":1,"error":{"kind":"unavailable","message":"m"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		found, err := exec.DecodeProven(raw, grants)
		if err != nil {
			if found != nil {
				t.Errorf("DecodeProven(%q) returns values with %v", raw, err)
			}
			return
		}
		var loose struct {
			Evidence []struct{ Grant, Outcome string }
		}
		if err := json.Unmarshal(raw, &loose); err != nil || len(loose.Evidence) != len(grants) || len(found) != len(grants) {
			t.Fatalf("DecodeProven(%q) = %d elements of evidence, a lenient decoder reads %v, %v", raw, len(found), loose, err)
		}
		for i, e := range found {
			allowed := []broker.Outcome{broker.OutcomeAlive, broker.OutcomeDead, broker.OutcomeUnknown}
			if grants[i].Narrowing == broker.NarrowNone {
				allowed = append(allowed, broker.OutcomeStatic)
			}
			read := loose.Evidence[i]
			if !slices.Contains(allowed, e.Outcome) || read.Grant != string(grants[i].ID) ||
				e.Outcome == broker.OutcomeDead && read.Outcome != "dead" {
				t.Errorf("DecodeProven(%q)[%d] = %q of %q, a lenient decoder reads %q", raw, i, e.Outcome, grants[i].ID, read)
			}
			if e.Check == "" || e.Answer == "" || strings.ContainsFunc(e.Check+e.Answer, func(r rune) bool { return r < ' ' || r > '~' }) || len(e.Answer) > 200 {
				t.Errorf("DecodeProven(%q)[%d] has the texts %q, %q", raw, i, e.Check, e.Answer)
			}
		}
	})
}

// FuzzFound checks that every element found is a grant id, unchanged.
func FuzzFound(f *testing.F) {
	for _, s := range []string{`{"version":1,"grants":["gr000000000000000000000001"]}`, `{"version":1,"grants":["GR000000000000000000000001",""]}`, `{"version":1}`, `{"version":2,"grants":[]}`, `[]`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		ids, err := exec.DecodeFound(raw)
		if err != nil {
			return
		}
		var loose struct{ Grants []string }
		if err := json.Unmarshal(raw, &loose); err != nil || len(loose.Grants) != len(ids) {
			t.Fatalf("DecodeFound(%q) = %q, a lenient decoder reads %q, %v", raw, ids, loose.Grants, err)
		}
		for i, id := range ids {
			if again, err := broker.ParseGrantID(string(id)); err != nil || again != id || loose.Grants[i] != string(id) {
				t.Errorf("DecodeFound(%q)[%d] = %q, %v", raw, i, id, err)
			}
		}
	})
}
