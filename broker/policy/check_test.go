package policy_test

import (
	"os"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/policy"
)

// TestSituations runs four example bundles with their policy tests.
func TestSituations(t *testing.T) {
	for _, name := range []string{"support", "ci", "procurement", "copilot"} {
		p, results, err := policy.Test(os.DirFS("testdata/" + name))
		if err != nil {
			t.Errorf("Test(%s) = %v", name, err)
			continue
		}
		for _, r := range results {
			if r.Fail != "" {
				t.Errorf("%s/%v", name, r)
			}
		}
		if w := p.Warnings(); len(w) > 0 {
			t.Errorf("%s: Warnings() = %q, want none", name, w)
		}
		if len(results) < 5 {
			t.Errorf("%s: %d rows", name, len(results))
		}
	}
}

const row = "tests:\n  - name: x\n    caller: spiffe://acme.example/ci/runner\n    tool: db.read\n"

func TestRunTestsReports(t *testing.T) {
	p := load(t, someCedar)
	for _, tt := range []struct{ name, yaml, want string }{
		{"right", row + "    expect: allow\n", "t.yaml:2: x: ok"},
		{"wrong answer", row + "    expect: deny\n", "answer is allow, want deny: permitted by ci"},
		{"wrong policies", row + "    expect: allow\n    policies: [other]\n", "policies is [ci], want [other]"},
		{"unstated approval", row + "    expect: allow\n    approval: 1 of x\n", "approval is , want 1 of x"},
		{"wrong consequence", row + "    expect: allow\n    consequence: revoke-chain\n", "consequence is deny, want revoke-chain"},
		{"wrong ttl", row + "    expect: allow\n    ttl: 5s\n", "ttl is 0s, want 5s"},
		{"wrong narrowing", row + "    expect: allow\n    narrowing: native\n", "narrowing is none, want native"},
		{"wrong failed", row + "    expect: allow\n    failed: true\n", "failed is false, want true"},
	} {
		results, err := policy.RunTests(p, "t.yaml", []byte(tt.yaml))
		if err != nil || len(results) != 1 || !strings.Contains(results[0].String(), tt.want) {
			t.Errorf("%s: RunTests = %v, %v, want %q", tt.name, results, err, tt.want)
		}
	}
}

func TestRunTestsRefuses(t *testing.T) {
	p := load(t, someCedar)
	for _, tt := range []struct{ name, yaml, want string }{
		{"no expectation", row, "t.yaml:2: expect must be allow or deny"},
		{"unknown key", row + "    expects: allow\n", `t.yaml:5: unknown field "expects"`},
		{"repeated key", row + "    tool: db.write\n", "t.yaml:5: mapping key"},
		{"no caller", "tests:\n  - expect: deny\n", "t.yaml:2: caller"},
		{"unknown action", row + "    action: destroy\n    expect: deny\n", "action"},
		{"nested argument", row + "    args: {a: {b: 1}}\n    expect: deny\n", `argument "a"`},
		{"fraction", row + "    args: {a: 1.5}\n    expect: deny\n", `argument "a"`},
		{"receiver in a use", row + "    receiver: spiffe://a.example/x\n    expect: deny\n", "delegate requires a receiver"},
		{"time", row + "    at: noon\n    expect: deny\n", "at:"},
		{"age", row + "    chain: {age: old}\n    expect: deny\n", "chain.age"},
		{"anchor", "tests: &a\n  - *a\n", "anchors"},
		{"two documents", row + "---\n" + row, "exactly one document"},
		{"empty", "", "exactly one document"},
		{"no tests", "tests: []\n", "no tests"},
	} {
		_, err := policy.RunTests(p, "t.yaml", []byte(tt.yaml))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: RunTests = %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestQuestions(t *testing.T) {
	raw, err := os.ReadFile("testdata/ci/ci.test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	questions, err := policy.Questions("ci.test.yaml", raw)
	if err != nil {
		t.Fatalf("Questions: %v", err)
	}
	live, _, err := policy.Test(os.DirFS("testdata/ci"))
	if err != nil {
		t.Fatal(err)
	}
	allowed := 0
	for _, d := range policy.Diff(live, load(t, ""), questions...) {
		if d.Live.Allow {
			allowed++
		}
	}
	if allowed != 5 { // the rows that expect allow, and the delegation to another trust domain, which the broker refuses
		t.Errorf("Diff against an empty bundle found %d lost allows of %d questions, want 5", allowed, len(questions))
	}
	if _, err := policy.Questions("t.yaml", []byte("tests:\n  - caller: me\n")); err == nil || !strings.HasPrefix(err.Error(), "t.yaml:2: caller") {
		t.Errorf("Questions with a malformed caller = %v", err)
	}
}
