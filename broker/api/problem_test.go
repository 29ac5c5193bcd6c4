package api_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/api"
)

// TestReasons checks the table, and compares problems.md with it. With -update it writes the page.
func TestReasons(t *testing.T) {
	var page strings.Builder
	page.WriteString("# Problem codes\n\nGenerated from the table in codes.go. An answer that is not a success is an RFC 9457 problem with one of these codes\nin `code`. Retry *later* means that the same request may succeed later; a `retry_after_ms` says when.\n")
	seen := map[api.Code]bool{}
	for _, r := range api.Reasons() {
		if seen[r.Code] || r.Title == "" || r.Do == "" {
			t.Errorf("Reasons() has %q twice, or without a title or an action", r.Code)
		}
		seen[r.Code] = true
		status, again := fmt.Sprintf("%d", api.Status(r.Kind, r.Code)), "no"
		if r.Code == api.CodeNoAnswer || r.Code == api.CodeRepeated {
			status = "none"
		}
		if r.Retryable {
			again = "later"
		}
		fmt.Fprintf(&page, "\n## %s\n\n%s. Status %s, kind `%s`, retry: %s. **Action:** %s\n", r.Code, r.Title, status, r.Kind, again, r.Do)
	}
	golden(t, "problems.md", []byte(page.String()))
}

func TestStatus(t *testing.T) {
	for code, want := range map[api.Code]int{
		"malformed": http.StatusBadRequest, "unauthenticated": http.StatusUnauthorized,
		"policy_denied": http.StatusForbidden, "delegation_unknown": http.StatusNotFound,
		"fenced": http.StatusConflict, "frozen": http.StatusConflict, "key_other_tool": http.StatusConflict,
		"expired": http.StatusGone, "too_fast": http.StatusTooManyRequests,
		"too_large": http.StatusRequestEntityTooLarge, "media_type": http.StatusUnsupportedMediaType,
		"method_not_allowed": http.StatusMethodNotAllowed, "vault_unavailable": http.StatusServiceUnavailable,
		"internal": http.StatusInternalServerError,
	} {
		if r, ok := api.ReasonFor(code); !ok || api.Status(r.Kind, code) != want {
			t.Errorf("Status(%q, %q) = %d, want %d", r.Kind, code, api.Status(r.Kind, code), want)
		}
	}
	if got := api.Status("of another version", "unheard_of"); got != http.StatusInternalServerError {
		t.Errorf("Status of an unknown kind = %d, want 500", got)
	}
}

func TestProblem(t *testing.T) {
	cause := errors.New("a cause")
	var err error = fmt.Errorf("taking a step: %w", api.NewProblem(api.KindRevoked, "fenced", "revoked at noon").Because(cause))
	for target, want := range map[error]bool{api.KindRevoked: true, api.KindDenied: false, cause: true} {
		if got := errors.Is(err, target); got != want {
			t.Errorf("errors.Is(%v, %v) = %v, want %v", err, target, got, want)
		}
	}
	if p := api.NewProblem(api.KindDenied, "", ""); p.Code != "denied" || p.Title != "Not allowed" || p.Retryable {
		t.Errorf("NewProblem(denied) = %+v, want the kind's own code", p)
	}
	if p := api.NewProblem(api.KindDenied, "budget_exhausted", "").After(time.Microsecond); !p.Retryable || p.RetryAfter() != time.Millisecond {
		t.Errorf("After(1µs) = %+v, want it retryable after 1 ms", p)
	}
	if p := api.NewProblem(api.KindUnavailable, "of_a_later_version", ""); !p.Retryable || p.Title == "" {
		t.Errorf("NewProblem of an unknown code = %+v, want the defaults of its kind", p)
	}
}
