package broker_test

import (
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker"
)

func TestParseIDs(t *testing.T) {
	parsers := map[string]func(string) (string, error){
		"ch": func(s string) (string, error) { v, err := broker.ParseChainID(s); return string(v), err },
		"dl": func(s string) (string, error) { v, err := broker.ParseDelegationID(s); return string(v), err },
		"gr": func(s string) (string, error) { v, err := broker.ParseGrantID(s); return string(v), err },
		"rv": func(s string) (string, error) { v, err := broker.ParseRevocationID(s); return string(v), err },
	}
	const body = "0123456789abcdefghjkmnpq"
	for prefix, parse := range parsers {
		if got, err := parse(prefix + body); err != nil || got != prefix+body {
			t.Errorf("parsing %s = %q, %v, want it as it is", prefix+body, got, err)
		}
		wrong := []string{
			"", prefix, prefix + body[1:], prefix + body + "0", "xx" + body, " " + prefix + body[1:],
			strings.ToUpper(prefix) + body, prefix + strings.ToUpper(body),
			prefix + body[1:] + "/", prefix + body[1:] + "\x00", prefix + body[2:] + "é",
		}
		for _, c := range "ilou-_.*" {
			wrong = append(wrong, prefix+body[1:]+string(c))
		}
		for other := range parsers {
			if other != prefix {
				wrong = append(wrong, other+body)
			}
		}
		for _, s := range wrong {
			if _, err := parse(s); err == nil {
				t.Errorf("parsing %q as %s id: accepted, want an error", s, prefix)
			}
		}
	}
}
