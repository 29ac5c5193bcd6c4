package exec

import (
	"time"

	"github.com/pawlsec/pawl/broker"
)

// DecodePrepared decodes a response to prepare like [Backend.Prepare], for a tool at the path.
func DecodePrepared(raw []byte, tool broker.VaultPath, write bool) (mint, secret []string, data map[string]string, err error) {
	var r prepared
	if err := read(raw, &r); err != nil {
		return nil, nil, nil, err
	}
	if _, err := r.mintPath(tool); err != nil {
		return nil, nil, nil, err
	}
	if err := r.check(write); err != nil {
		return nil, nil, nil, err
	}
	data = map[string]string{}
	for name, value := range r.Data {
		data[name] = string(value)
	}
	return r.Path, r.Secret, data, nil
}

// DecodeProven decodes a response to prove like [Backend.Prove].
func DecodeProven(raw []byte, grants []broker.Grant) ([]broker.Evidence, error) {
	var r proven
	if err := read(raw, &r); err != nil {
		return nil, err
	}
	return (&Backend{cfg: Config{Now: time.Now}}).proven(r, grants)
}

// DecodeFound decodes a response to find like [Backend.Find].
func DecodeFound(raw []byte) ([]broker.GrantID, error) {
	var r foundGrants
	if err := read(raw, &r); err != nil {
		return nil, err
	}
	return (&Backend{}).found(r)
}

func read(raw []byte, r response) error {
	if err := decode(raw, r); err != nil {
		return err
	}
	return r.failure(Program{})
}
