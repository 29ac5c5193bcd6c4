package records

import (
	"strings"

	"github.com/pawlsec/pawl/broker"
)

// EachScheduled calls f with each item of the list of live grants. An earlier build listed the id alone: such a grant
// is read.
func (t *Tx) EachScheduled(f func(Scheduled)) error {
	var unread []broker.GrantID
	backends := map[string]string{} // one copy of each name: a hundred thousand are kept
	var err error
	scanErr := t.tx.Scan(prefixLive, "", func(key string, raw []byte) bool {
		id := broker.GrantID(key[len(key)-broker.IDLength:])
		if len(raw) == 0 {
			unread = append(unread, id)
			return true
		}
		var s Scheduled
		if err = decode(key, raw, &s); err != nil {
			return false
		}
		if name, ok := backends[s.Backend]; ok {
			s.Backend = name
		} else {
			backends[s.Backend] = s.Backend
		}
		s.ID = broker.GrantID(strings.Clone(string(id))) // the key is twice as long
		f(s)
		return true
	})
	if err == nil {
		err = scanErr
	}
	return each(unread, err, func(id broker.GrantID) error {
		g, ok, err := t.Grant(id)
		if err == nil && ok {
			f(scheduledOf(&g))
		}
		return err
	})
}

// Misscheduled compares up to n grants after a key of the list of live grants with the list. plain has those of which the
// list has the id alone, and wrong those of which it has anything else than they are. last is the key of the last one;
// empty: there are no more.
func (t *Tx) Misscheduled(after string, n int) (plain, wrong []broker.GrantID, last string, err error) {
	listed := map[broker.GrantID]string{}
	var read []broker.GrantID
	if err := t.tx.Scan(prefixLive, after, func(key string, raw []byte) bool {
		id := broker.GrantID(key[len(key)-broker.IDLength:])
		listed[id], read, last = string(raw), append(read, id), key
		return len(read) < n
	}); err != nil {
		return nil, nil, "", err
	}
	err = each(read, nil, func(id broker.GrantID) error {
		g, ok, err := t.Grant(id)
		if err != nil || !ok || g.State == broker.StateClosed {
			return err
		}
		right, err := encode(keyLive(g.Chain, id), scheduledOf(&g))
		switch {
		case listed[id] == "":
			plain = append(plain, id)
		case listed[id] != string(right):
			wrong = append(wrong, id)
		}
		return err
	})
	return plain, wrong, last, err
}

// Reschedule lists grants as they are, and returns those that are live.
func (t *Tx) Reschedule(ids []broker.GrantID) (list []Scheduled, err error) {
	err = each(ids, nil, func(id broker.GrantID) error {
		g, ok, err := t.Grant(id)
		if err != nil || !ok || g.State == broker.StateClosed {
			return err
		}
		list = append(list, scheduledOf(&g))
		return save(t, keyLive(g.Chain, id), scheduledOf(&g))
	})
	return list, err
}
