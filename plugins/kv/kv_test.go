package kv_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/plugins/kv"
)

func tool(path string) broker.Tool {
	return broker.Tool{Name: "token", Backend: "kv", Path: brokertest.Path(path)}
}

func TestLoad(t *testing.T) {
	b := kv.New(kv.Config{})
	native, proxy, settings := tool("secret/a"), tool("secret/a"), tool("secret/a")
	native.Narrowing, proxy.Narrowing = broker.NarrowNative, broker.NarrowProxy
	settings.Settings = map[string]string{"field": "a"}
	for _, row := range []struct {
		tool broker.Tool
		ok   bool
	}{
		{tool("secret/a"), true}, {tool("secret/team/a_b-c.d"), true}, {tool(strings.Repeat("a/", 15) + "a"), true},
		{tool("secret"), false}, {broker.Tool{Name: "token", Backend: "kv"}, false}, {native, false}, {proxy, false}, {settings, false},
	} {
		if err := b.Load(row.tool); (err == nil) != row.ok {
			t.Errorf("Load(%q, %v) = %v, want ok %v", row.tool.Path, row.tool.Narrowing, err, row.ok)
		}
	}
}

func TestPrepare(t *testing.T) {
	b := kv.New(kv.Config{})
	m, name, err := b.Prepare(t.Context(), tool("secret/team/a"), broker.Grant{ID: "gr1"})
	if err != nil || m.Path.String() != "secret/data/team/a" || m.Data != nil || m.Leased || name != "gr1" {
		t.Fatalf("Prepare() = %+v, %q, %v", m, name, err)
	}
	f, err := m.Finish(map[string]any{"data": map[string]any{"n": json.Number("12345678901234567890")},
		"metadata": map[string]any{"version": json.Number("3")}}, time.Time{})
	if err != nil || string(f.Secret.Reveal()) != `{"n":12345678901234567890}` || f.Ref != "version 3" {
		t.Errorf("Finish() = ref %q, %v", f.Ref, err)
	}
	if len(f.Digests) > 0 {
		t.Errorf("Finish() returns the digests %v, want none: a digest of a guessable value reveals it", f.Digests)
	}
	for _, answer := range []map[string]any{nil, {"data": nil}, {"data": map[string]any{}}, {"data": "x"}} {
		if _, err := m.Finish(answer, time.Time{}); err == nil {
			t.Errorf("Finish(%v) succeeded", answer)
		}
	}
	e, err := b.Prove(t.Context(), make([]broker.Grant, 2))
	if err != nil || len(e) != 2 || e[1].Outcome != broker.OutcomeStatic {
		t.Errorf("Prove() = %v, %v", e, err)
	}
}
