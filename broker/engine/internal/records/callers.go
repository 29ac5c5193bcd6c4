package records

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// A step counts for its caller, and for the principal of its chain: the subject of its envelope, or its opener. So
// neither another chain nor a delegation to another agent makes more of a limit.

// Subjects returns those for whom a step counts.
func Subjects(c broker.Caller, chain broker.Chain) []string {
	caller, principal := c.ID.String(), chain.Principal()
	if caller == principal {
		return []string{caller}
	}
	return []string{caller, principal}
}

// hashed is 128 bits of the SHA-256 of texts, which have no zero byte.
func hashed(texts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(texts, "\x00")))
	return hex.EncodeToString(sum[:16])
}

func keyHistory(subject string, tool broker.ToolName) string {
	return prefixTally + "h/" + hashed(subject) + "/" + hashed(string(tool))
}

func keyLimit(l broker.Limit, subject string) string {
	return prefixTally + "l/" + hashed(l.Policy, subject, l.Label, l.Value)
}

// CallerUse is the part of a decision that concerns the steps of a caller in all chains.
type CallerUse struct {
	Subjects []string
	Windows  []time.Duration // of the policy's rules over histories; none: no history is kept
	Limits   []broker.Limit
}

// Keys returns the records in which a step with the tool counts.
func (u CallerUse) Keys(tool broker.ToolName) (keys []string) {
	for _, subject := range u.Subjects {
		if len(u.Windows) > 0 {
			keys = append(keys, keyHistory(subject, tool))
		}
		for _, l := range u.Limits {
			keys = append(keys, keyLimit(l, subject))
		}
	}
	return keys
}

// CallerHistory returns the steps with each tool in each window. A step counts for several subjects, so of each tool
// the count of the subject with the most steps is taken, and never their sum.
func (t *Tx) CallerHistory(u CallerUse, now time.Time) (map[time.Duration]map[broker.ToolName]broker.Past, error) {
	if len(u.Windows) == 0 {
		return nil, nil
	}
	history := map[time.Duration]map[broker.ToolName]broker.Past{}
	for _, w := range u.Windows {
		history[w] = map[broker.ToolName]broker.Past{}
	}
	for _, subject := range u.Subjects {
		tallies, err := t.tallies(prefixTally + "h/" + hashed(subject) + "/")
		if err != nil {
			return nil, err
		}
		for _, tally := range tallies {
			for _, w := range u.Windows {
				past, _ := tally.Within(w, now)
				if past.Count > 0 {
					history[w][tally.Tool] = merge(history[w][tally.Tool], past)
				}
			}
		}
	}
	return history, nil
}

func merge(a, b broker.Past) broker.Past {
	if a.Count == 0 {
		return b
	}
	if b.First.Before(a.First) {
		a.First = b.First
	}
	if b.Last.After(a.Last) {
		a.Last = b.Last
	}
	a.Count = max(a.Count, b.Count)
	return a
}

// tallies reads the records below a prefix.
func (t *Tx) tallies(prefix string) (list []Tally, err error) {
	var broken error
	err = t.tx.Scan(prefix, "", func(key string, value []byte) bool {
		var tally Tally
		broken = decode(key, value, &tally)
		list = append(list, tally)
		return broken == nil
	})
	if err == nil {
		err = broken
	}
	return list, err
}

// OverLimit refuses a step that a limit of its caller, or of its chain's principal, does not allow now.
func (t *Tx) OverLimit(op string, u CallerUse, now time.Time) error {
	for _, l := range u.Limits {
		for _, subject := range u.Subjects {
			tally, _, err := load[Tally](t, keyLimit(l, subject))
			if err != nil {
				return err
			}
			if past, frees := tally.Within(l.Window, now); past.Count >= l.Steps {
				return broker.Errorf(broker.Denied, op, "the limit of policy %q is reached: %d steps in %s, in all chains together",
					l.Policy, l.Steps, l.Window).With(broker.CodeCallerLimit).Decided([]string{l.Policy}).
					Lacks("wait, or ask the platform team for a higher limit", "limit:"+l.Policy).
					After(max(frees.Sub(now), time.Second))
			}
		}
	}
	return nil
}

// CountCaller counts a step in each of the keys. It also drops some records that no window can reach any more.
func (t *Tx) CountCaller(keys []string, tool broker.ToolName, now time.Time) error {
	for _, key := range keys {
		tally, _, err := load[Tally](t, key)
		if err != nil {
			return err
		}
		if strings.HasPrefix(key, prefixTally+"h/") {
			tally.Tool = tool
		}
		if err := save(t, key, tally.Add(now)); err != nil {
			return err
		}
		if err := t.dropOver(key, now); err != nil {
			return err
		}
	}
	return nil
}

// dropped is how many of the records after a written one are looked at.
const dropped = 8

// dropOver drops the records right after a key that no window can reach. The writer of a key cleans up behind it, so
// the records of all callers that are gone are dropped in time without a scan.
func (t *Tx) dropOver(key string, now time.Time) error {
	var gone []string
	var broken error
	seen := 0
	look := func(key string, value []byte) bool {
		var tally Tally
		if broken = decode(key, value, &tally); broken == nil && tally.over(now) {
			gone = append(gone, key)
		}
		seen++
		return broken == nil && seen < dropped
	}
	err := t.tx.Scan(prefixTally, key, look)
	if err == nil && broken == nil && seen < dropped { // the first follows the last
		err = t.tx.Scan(prefixTally, "", look)
	}
	if err == nil {
		err = broken
	}
	return each(gone, err, t.drop)
}
