package exec

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// DecodePrepared reads an answer to prepare as [Backend.Prepare] does, for a tool at the path.
func DecodePrepared(raw []byte, path []string, write bool) (mint, secret []string, data map[string]string, err error) {
	var a prepared
	if err := decode(raw, &a); err != nil {
		return nil, nil, nil, err
	}
	if err := a.refused(Program{}); err != nil {
		return nil, nil, nil, err
	}
	if err := a.check(path, write); err != nil {
		return nil, nil, nil, err
	}
	data = map[string]string{}
	for name, value := range a.Data {
		data[name] = string(value)
	}
	return a.Path, a.Secret, data, nil
}

// DecodeProven reads an answer to prove as [Backend.Prove] does.
func DecodeProven(raw []byte, grants []broker.Grant) ([]broker.Evidence, error) {
	var a proven
	if err := read(raw, &a); err != nil {
		return nil, err
	}
	return (&Backend{cfg: Config{Now: time.Now}}).proven(a, grants)
}

// DecodeFound reads an answer to find as [Backend.Find] does.
func DecodeFound(raw []byte) ([]broker.GrantID, error) {
	var a foundGrants
	if err := read(raw, &a); err != nil {
		return nil, err
	}
	return (&Backend{}).found(a)
}

func read(raw []byte, a answer) error {
	if err := decode(raw, a); err != nil {
		return err
	}
	return a.refused(Program{})
}
