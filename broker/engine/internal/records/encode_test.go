package records

import (
	"encoding/hex"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

var moment = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)

// full returns a record of each type with every field set.
func full(t testing.TB) map[string]any {
	t.Helper()
	path, err := broker.ParseVaultPath("database/creds/reader")
	if err != nil {
		t.Fatal(err)
	}
	tables, err := args.ParseConstraint([]byte(`{"one_of":["orders","items"]}`))
	if err != nil {
		t.Fatal(err)
	}
	given, err := args.New(map[string]args.Value{"table": args.String("orders"), "limit": args.Int(9),
		"all": args.Bool(true), "columns": args.List("a", "b")})
	if err != nil {
		t.Fatal(err)
	}
	digest := given.Digest()
	agent := spiffeid.RequireFromString("spiffe://example.org/agents/planner")
	fence := &broker.Fence{Generation: 7, At: moment, Revocation: "rv000000000000000000000001", Frozen: true}
	token := broker.Handle{Accessor: "accessor", Expires: moment}
	const chain, root, node = "ch000000000000000000000001", "dl000000000000000000000001", "dl000000000000000000000002"
	const grant = "gr000000000000000000000001"
	constraints := map[string]args.Constraint{"table": tables, "none": {}}
	return map[string]any{
		"chain": broker.Chain{ID: chain, Task: "weekly report", Opener: agent, Opened: moment,
			Labels: map[string]string{"env": "prod"}, Root: root,
			Envelope: &broker.Envelope{Issuer: "https://desk.example", ID: "j-1", Digest: "sha256:x", Task: "ticket 17",
				Labels: map[string]string{"team": "payments"}, Behalf: "ana", Issued: moment, Expires: moment.Add(time.Hour)}},
		"delegation": broker.Delegation{ID: node, Chain: chain, Parent: root, Holder: agent,
			Scope: broker.Scope{{Tool: "db.read", Use: true, Delegate: true, Args: constraints},
				{Tool: "deploy", Use: true}},
			Budget: broker.Budget{Steps: 1, Live: 2, PerMinute: 3, Tools: map[broker.ToolName]int{"deploy": 4}},
			Depth:  5, Created: moment, Expires: moment.Add(time.Hour),
			Tokens: []broker.Handle{token, {Accessor: "second"}}, Fence: fence, Heartbeat: time.Minute},
		"grant": broker.Grant{ID: grant, Chain: chain, Delegation: node, Caller: agent, Tool: "db.read",
			Backend: "postgres", Narrowing: broker.NarrowNative, Args: given, Purpose: "rows",
			Path: path, State: broker.StateClosed, Created: moment, Expires: moment.Add(time.Minute),
			Bundle: "sha256:" + strings.Repeat("0", 64), Policies: []string{"readers", "hours"},
			Token: token, DelegationToken: token, MintDeadline: moment,
			Lease: broker.Lease{ID: "database/creds/reader/x", Ref: "login", Expires: moment, Outlives: moment,
				Request: "f9f6c4f5", Digests: []broker.ValueDigest{"d"}},
			Fence: fence, Ending: broker.EndingRevoked, Ended: moment, Outcome: broker.OutcomeDead,
			Evidence: []broker.Evidence{{At: moment, Check: "vault: look the lease up", Outcome: broker.OutcomeDead,
				Answer: "gone", Listed: true, Final: true}, {At: moment, Check: "ledger", Answer: "no answer"}},
			ArgsDigest: hex.EncodeToString(digest[:]), Longest: time.Minute, Sealed: "thumbprint", Collector: agent,
			Collected: moment, Held: true, NothingMade: true, Counted: []string{"q/l/x"}},
		"tally": Tally{Tool: "deploy", Last: moment, Buckets: []Bucket{{First: moment, Minutes: 60, Count: 2}}},
		"usage": Usage{Steps: 9, Live: 2, Minute: 1234, InIt: 3,
			Tools: map[broker.ToolName]broker.Past{"deploy": {Count: 1, First: moment, Last: moment}}},
		"revocation": broker.Revocation{ID: "rv000000000000000000000001", Selector: "chain:x", Reason: "a reason",
			By: "ana", Freeze: true, Lifted: true, Unfreezer: "bo", Chain: chain, Node: root, Grant: grant,
			Asked: moment, Fenced: moment, Revision: 8, Settled: moment, Closure: broker.ClosurePartial, Nothing: true,
			LiftedAlone: "alone", Uncounted: true, Grants: 6, Dead: 1, Alive: 2, Unknown: 3, Static: 1, Tokens: 4, Unswept: true, Leases: 5, LatestEnd: moment},
		"rule": Rule{Fence: *fence, Selector: "tool:db.read"},
		"canary": broker.Canary{ID: "cn000000000000000000000001", Chain: chain, Note: "home", By: "ana",
			Planted: moment, Touched: moment, Touches: 2},
		"bundle":       Bundle{Name: "main", Version: 3, Digest: "sha256:x", Since: moment, By: "pawl"},
		"acknowledged": acknowledged{At: moment},
		"cursor":       cursor{Revision: 99},
		"scheduled":    Scheduled{Backend: "shop", Expires: moment, Abandoned: true, Held: true},
	}
}

// TestEncodingKeepsAll holds that decode returns every field of every record, from the latest format and from the JSON
// of older builds. It does so for zero records too. checkFull fails when a later build adds a field and full lacks it.
func TestEncodingKeepsAll(t *testing.T) {
	for name, rec := range full(t) {
		checkFull(t, name, reflect.ValueOf(rec))
		for _, want := range []any{rec, reflect.New(reflect.TypeOf(rec)).Elem().Interface()} {
			raw, err := encode(name, want)
			if err != nil {
				t.Fatalf("encode(%s) = %v", name, err)
			}
			older, err := json.Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			if raw[0] != version1 || older[0] != jsonOpen {
				t.Errorf("%s begins with %d, and with %d in JSON; want %d and %d",
					name, raw[0], older[0], version1, jsonOpen)
			}
			if name == "grant" && len(raw)*10 > len(older)*7 {
				t.Errorf("a grant has %d bytes, and %d in JSON; want at most 70%% of that", len(raw), len(older))
			}
			for format, raw := range map[string][]byte{"the latest format": raw, "JSON": older} {
				got := reflect.New(reflect.TypeOf(want))
				if err := decode(name, raw, got.Interface()); err != nil {
					t.Errorf("decode(%s) of %s = %v", name, format, err)
					continue
				}
				if a, b := asJSON(t, got.Elem().Interface()), asJSON(t, want); a != b {
					t.Errorf("decode(%s) of %s =\n%s, want\n%s", name, format, a, b)
				}
			}
		}
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// checkFull fails the test when a field of the struct is zero, or one of a struct in it.
func checkFull(t *testing.T, name string, v reflect.Value) {
	t.Helper()
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.IsExported() && f.Type.Kind() == reflect.Struct {
			checkFull(t, name+"."+f.Name, v.Field(i))
		}
		if f.IsExported() && f.Tag.Get("json") != "-" && v.Field(i).IsZero() {
			t.Errorf("full does not set %s.%s", name, f.Name)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	g, err := encode("g/x", full(t)["grant"])
	if err != nil {
		t.Fatal(err)
	}
	swapped := []byte(strings.Replace(string(g), "orders", "salary", 1))
	for name, row := range map[string]struct {
		raw  []byte
		want string
	}{
		"no bytes":              {nil, "empty"},
		"a later version":       {[]byte{2, 0xa0}, "version 2"},
		"a truncated record":    {g[:len(g)/2], "EOF"},
		"trailing data":         {append(g[:len(g):len(g)], 0), "extraneous"},
		"a list":                {[]byte{version1, 0x80}, "cannot unmarshal"},
		"a key twice":           {[]byte{version1, 0xa2, 1, 0x60, 1, 0x60}, "duplicate"},
		"other arguments":       {swapped, "digest"},
		"JSON that is no grant": {[]byte(`{"id":7}`), "cannot unmarshal"},
	} {
		var got broker.Grant
		err := decode("g/x", row.raw, &got)
		if err == nil || !strings.Contains(err.Error(), row.want) || !strings.Contains(err.Error(), `"g/x"`) {
			t.Errorf("decode(%s) = %v, want an error with %q that names the record", name, err, row.want)
		}
	}
}

// FuzzDecode holds that no input makes decode panic, and that a decoded record is the same after it is encoded and decoded
// again.
func FuzzDecode(f *testing.F) {
	for name, rec := range full(f) {
		raw, err := encode(name, rec)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"id":"gr000000000000000000000001","args":{"a":1}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for name, rec := range full(t) {
			got := reflect.New(reflect.TypeOf(rec))
			if decode(name, raw, got.Interface()) != nil {
				continue
			}
			again, err := encode(name, got.Elem().Interface())
			if err != nil {
				t.Fatalf("encode of a decoded %s = %v", name, err)
			}
			back := reflect.New(reflect.TypeOf(rec))
			if err := decode(name, again, back.Interface()); err != nil {
				t.Fatalf("decode of a re-encoded %s = %v", name, err)
			}
			if a, b := asJSON(t, got.Elem().Interface()), asJSON(t, back.Elem().Interface()); raw[0] == version1 && a != b {
				t.Fatalf("a %s came back as\n%s, want\n%s", name, b, a)
			}
		}
	})
}

func BenchmarkGrant(b *testing.B) {
	g := full(b)["grant"].(broker.Grant)
	raw, err := encode("g", g)
	if err != nil {
		b.Fatal(err)
	}
	older, err := json.Marshal(g)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("encode", func(b *testing.B) {
		b.ReportMetric(float64(len(raw)), "bytes")
		for b.Loop() {
			_, _ = encode("g", g)
		}
	})
	b.Run("encode/json", func(b *testing.B) {
		b.ReportMetric(float64(len(older)), "bytes")
		for b.Loop() {
			_, _ = json.Marshal(g)
		}
	})
	b.Run("decode", func(b *testing.B) {
		for b.Loop() {
			var got broker.Grant
			_ = decode("g", raw, &got)
		}
	})
	b.Run("decode/json", func(b *testing.B) {
		for b.Loop() {
			var got broker.Grant
			_ = json.Unmarshal(older, &got)
		}
	})
	live, err := encode("l", scheduledOf(&g))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("scheduled", func(b *testing.B) {
		b.ReportMetric(float64(len(live)), "bytes")
		for b.Loop() {
			var got Scheduled
			_ = decode("l", live, &got)
		}
	})
}
