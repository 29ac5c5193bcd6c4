package agent_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// parsers parse one kind of id each.
var parsers = map[string]func(string) (string, error){
	"ch": parser(agent.ParseChainID),
	"dl": parser(agent.ParseDelegationID),
	"gr": parser(agent.ParseGrantID),
	"rv": parser(agent.ParseRevocationID),
}

func parser[ID ~string](parse func(string) (ID, error)) func(string) (string, error) {
	return func(s string) (string, error) { id, err := parse(s); return string(id), err }
}

func TestParseIDs(t *testing.T) {
	const body = "0123456789abcdefghjkmnpq"
	for prefix, parse := range parsers {
		for _, good := range []string{body, "rstvwxyz0000000000000000", strings.Repeat("z", 24)} {
			if id, err := parse(prefix + good); err != nil || id != prefix+good {
				t.Errorf("parsing %s = %q, %v, want it unchanged", prefix+good, id, err)
			}
		}
		bad := []string{
			"", prefix, prefix + body[1:], prefix + body + "0", " " + prefix + body, prefix + body[1:] + " ",
			prefix + body[1:] + "/", strings.ToUpper(prefix) + body, prefix + strings.ToUpper(body),
			prefix + body[:23] + "\n", prefix + body[:22] + "é",
		}
		for _, c := range "ilouIZ-_.%" {
			bad = append(bad, prefix+body[:10]+string(c)+body[11:])
		}
		for other := range parsers {
			if other != prefix {
				bad = append(bad, other+body)
			}
		}
		for _, s := range bad {
			id, err := parse(s)
			if id != "" || !errors.Is(err, agent.ErrMalformed) || !strings.Contains(err.Error(), `"`+prefix+`" and 24`) {
				t.Errorf("parsing %q as %s = %q, %v, want malformed and the accepted form", s, prefix, id, err)
			}
		}
	}
	if _, err := agent.ParseGrantID(marker); err == nil || strings.Contains(err.Error(), marker) {
		t.Errorf("ParseGrantID of another text = %v, want an error without the text", err)
	}
}

func TestRevocationOf(t *testing.T) {
	p := api.NewProblem(api.KindRevoked, "fenced", "")
	p.Revocation = revocation
	if id, ok := agent.RevocationOf(fmt.Errorf("taking a step: %w", p)); !ok || id != revocation {
		t.Errorf("RevocationOf(%v) = %q, %v, want %s", p, id, ok, revocation)
	}
	for _, err := range []error{nil, errors.New("other"), api.NewProblem(api.KindRevoked, "fenced", "")} {
		if id, ok := agent.RevocationOf(err); ok {
			t.Errorf("RevocationOf(%v) = %q, want none", err, id)
		}
	}
}
