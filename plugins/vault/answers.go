package vault

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// answer is one row of the table of Vault's answers to requests.
type answer struct {
	when    string        // when Vault gives it, for docs/vault.md
	cause   error         // the client has no answer of Vault, for this reason; nil: Vault answered with status and phrase
	status  int           // zero: every status
	phrase  string        // in Vault's own text; empty: every text
	nothing bool          // the request certainly had no effect
	stale   bool          // the request named a version of a key that no longer signs
	kind    broker.Kind   // of the refusal; zero: broker.Unavailable
	code    broker.Code   // of the refusal of a token, and of a mint with nothing
	wait    time.Duration // until a retry, where Vault names no time; zero: a retry changes nothing
	says    string        // the refusal's message
}

// The waits before a retry.
const (
	soon  = time.Second
	later = 10 * time.Second // until a person or a lease's end changes something
)

// answers is the table. The first row that fits counts. A mint whose row has nothing is refused with the row's code;
// each other failure of a mint leaves its outcome unknown. docs/vault.md has the table, made by its test.
var answers = []answer{
	{when: "the broker is not logged in", cause: errNoSession, nothing: true, code: broker.CodeVaultDown, wait: soon,
		says: "the broker is not logged in to Vault"},
	{when: "no connection, or no handshake: the request was not sent", cause: errNotSent, nothing: true,
		code: broker.CodeVaultDown, wait: soon, says: "Vault cannot be reached"},
	{when: "Vault closed a kept-alive connection before any of the request was written", cause: errNotWritten, nothing: true,
		code: broker.CodeVaultDown, wait: soon, says: "Vault closed the connection before the request was sent"},
	{when: "the clocks differ by more than 3s", cause: errSkew, nothing: true, code: broker.CodeClockSkew, wait: later,
		says: "the clocks of the broker and of Vault differ"},
	{when: "a rate limit quota", status: 429, phrase: "rate limit quota exceeded", nothing: true,
		code: broker.CodeVaultBusy, wait: soon, says: "a quota in Vault limits the rate of requests"},
	{when: "a lease count quota", status: 429, phrase: "lease count quota exceeded", nothing: true,
		code: broker.CodeVaultBusy, wait: later, says: "a quota in Vault limits the number of leases"},
	{when: "any other 429, such as a proxy's", status: 429, code: broker.CodeVaultBusy, wait: soon,
		says: "the rate of requests to Vault is limited"},
	{when: "sealed", status: 503, phrase: "Vault is sealed", nothing: true, code: broker.CodeVaultDown, wait: later,
		says: "Vault is sealed"},
	{when: "overloaded: refused before it was handled", status: 503, phrase: "server temporarily overloaded",
		nothing: true, code: broker.CodeVaultBusy, wait: soon, says: "Vault is overloaded"},
	{when: "overloaded while it was handled", status: 503, phrase: "overloaded, try again later",
		code: broker.CodeVaultBusy, wait: soon, says: "Vault is overloaded"},
	{when: "a standby that finds no active node", status: 500, phrase: "active cluster node not found", nothing: true,
		code: broker.CodeVaultDown, wait: soon, says: "Vault has no active node"},
	{when: "a standby that redirects: it forwards nothing, or lost the active node while it forwarded", status: 307,
		code: broker.CodeVaultDown, wait: soon, says: "Vault is a standby that does not reach an active node"},
	{when: "a standby that lost the active node while it forwarded", status: 503, phrase: "no active Vault instance found",
		code: broker.CodeVaultDown, wait: soon, says: "Vault is a standby that does not reach an active node"},
	{when: "a version of a signing key below `min_encryption_version`", status: 500,
		phrase: "less than the minimum encryption key version", nothing: true, stale: true,
		code: broker.CodeVaultDown, wait: soon, says: "the signing key was rotated"},
	{when: "a version of a signing key that does not exist", status: 500,
		phrase: "higher than the latest key version", nothing: true, stale: true,
		code: broker.CodeVaultDown, wait: soon, says: "the signing key was replaced"},
	{when: "the token that asks has ended", status: 403, phrase: "invalid token", nothing: true,
		code: broker.CodeVaultDown, wait: soon, says: "the broker's token in Vault has ended"},
	{when: "no policy permits it: a policy is missing, or was changed", status: 403, phrase: "permission denied",
		nothing: true, code: broker.CodeVaultPolicy, says: "Vault permits it to no policy of the token"},
	{when: "any other 403", status: 403, nothing: true, code: broker.CodeVaultRefused, says: "Vault forbids it"},
	{when: "a token with more rights than its parent", status: 400, phrase: "child policies must be subset of parent",
		nothing: true, kind: broker.Denied, code: broker.CodeDelegationWider,
		says: "Vault refused a token with more rights than its parent"},
	{when: "a token with other policies than the token role allows", status: 400,
		phrase: "must be subset of the role's allowed policies", nothing: true, kind: broker.Denied,
		code: broker.CodeDelegationWider, says: "Vault refused a token with more rights than its parent"},
	{when: "a role that does not exist", status: 400, phrase: "unknown role", nothing: true,
		code: broker.CodeVaultRefused, says: "Vault has no such role"},
	{when: "any other 400, such as what a role does not allow", status: 400, nothing: true,
		code: broker.CodeVaultRefused, says: "Vault refuses the request of this step"},
	{when: "a mount or a namespace that does not exist", status: 404, phrase: "no handler for route", nothing: true,
		code: broker.CodeVaultRefused, says: "Vault has no such mount"},
	{when: "any other 404", status: 404, nothing: true, code: broker.CodeVaultRefused, says: "Vault has no such path"},
	{when: "a method that the path does not have", status: 405, nothing: true, code: broker.CodeVaultRefused,
		says: "Vault does not take such a request at this path"},
	{when: "a request with a value that is too large", status: 500, phrase: "JSON string value exceeds allowed length", nothing: true,
		code: broker.CodeVaultRefused, says: "the request of this step is too large for Vault"},
	{when: "a request that is too large", status: 413, nothing: true, code: broker.CodeVaultRefused,
		says: "the request of this step is too large for Vault"},
	{when: "a token with other rights than asked, such as an identity's", cause: errRights, nothing: true,
		code: broker.CodeVaultIdentity, says: "Vault gives the token other rights than the tool needs"},
	{when: "any other 500, also after a mint: an engine or an audit device failed", status: 500,
		code: broker.CodeVaultDown, wait: soon, says: "Vault failed"},
	{when: "any other status, such as a proxy's", cause: errStatus, code: broker.CodeVaultDown, wait: soon,
		says: "Vault does not serve requests"},
	{when: "an answer that is no acceptable secret or token", cause: errShape, code: broker.CodeVaultDown, wait: soon,
		says: "Vault's answer cannot be used"},
	{when: "an answer that is too large", cause: errTooLarge, code: broker.CodeVaultDown, wait: soon,
		says: "Vault's answer is too large"},
	{when: "no answer: a timeout, or a connection that broke when some of the request may have been written",
		code: broker.CodeVaultDown, wait: soon,
		says: "Vault did not answer"},
}

// answerTo returns the row of a failed request.
func answerTo(err error) answer {
	var f *failure
	answered := errors.As(err, &f)
	for _, a := range answers[:len(answers)-1] {
		switch {
		case a.cause == errStatus && answered,
			a.cause != nil && errors.Is(err, a.cause),
			a.cause == nil && answered && a.status == f.status && (a.phrase == "" || a.phrase == f.phrase):
			return a
		}
	}
	return answers[len(answers)-1]
}

// explain gives a failed request the kind, the code and the wait of its row. An error that has a kind keeps it, unless
// it is that of the login.
func explain(err error) error {
	var known *broker.Error
	if err == nil || errors.As(err, &known) && !errors.Is(err, errNoSession) {
		return err
	}
	a := answerTo(err)
	var f *failure
	wait := a.wait
	if errors.As(err, &f) && wait > 0 {
		wait = cmp.Or(f.retryAfter, wait)
	}
	return broker.Errorf(cmp.Or(a.kind, broker.Unavailable), "vault", "%s", a.says).With(a.code).Because(err).After(wait)
}

// knownPhrases are the parts of Vault's text that a failure keeps. The first one in a text counts.
var knownPhrases = func() (list []string) {
	for _, a := range answers {
		if a.phrase != "" {
			list = append(list, a.phrase)
		}
	}
	return append(list, "invalid lease", "invalid accessor", "token not found", "missing client token", "bad token",
		"path is already in use", "missing name in alias", "invalid certificate or no client certificate supplied",
		"client certificate must be supplied", "unsupported path", "request body too large", "error validating token",
		"service account name not authorized", "lease not found")
}()

// phraseOf returns the known phrase in Vault's texts.
func phraseOf(texts []string) string {
	for _, p := range knownPhrases {
		for _, text := range texts {
			// The engines spell "Unknown role" in two ways.
			if strings.Contains(text, p) || strings.Contains(text, strings.ToUpper(p[:1])+p[1:]) {
				return p
			}
		}
	}
	return ""
}

// longestWait bounds the wait of a header Retry-After.
const longestWait = time.Hour

// retryAfter reads the header Retry-After, in seconds or as a date. It is zero if there is none.
func retryAfter(h http.Header) time.Duration {
	text := h.Get("Retry-After")
	wait := time.Duration(0)
	if n, err := strconv.ParseUint(text, 10, 16); err == nil {
		wait = time.Duration(n) * time.Second
	} else if at, err := http.ParseTime(text); err == nil {
		if dated, err := http.ParseTime(h.Get("Date")); err == nil {
			wait = at.Sub(dated)
		}
	}
	return max(0, min(wait, longestWait))
}

// failure is a response with an error status. Its text holds no value of a request. Of Vault's own text it keeps only
// one of knownPhrases, since an engine may quote the failed statement, including its password.
type failure struct {
	status     int
	phrase     string        // one of knownPhrases, or empty
	retryAfter time.Duration // of the answer's header; zero: none
}

func (f *failure) Error() string {
	if f.phrase == "" {
		return fmt.Sprintf("vault returned status %d", f.status)
	}
	return fmt.Sprintf("vault returned status %d: %s", f.status, f.phrase)
}

// Is reports which sentinel the response matches.
func (f *failure) Is(target error) bool {
	switch target {
	case errForbidden:
		return f.status == 403
	case errWider:
		return f.phrase == "child policies must be subset of parent" ||
			f.phrase == "must be subset of the role's allowed policies"
	case errSealed:
		return f.status == 503 && f.phrase == "Vault is sealed"
	}
	return false
}

// Sentinels for errors.Is.
var (
	// errForbidden is Vault's 403. At a revocation it is an alarm and never counts as "already gone".
	errForbidden = errors.New("vault: permission denied")
	// errWider means that Vault refused a token with more rights than its parent has, or than the token role for root
	// delegations allows.
	errWider = errors.New("vault: a token's policies must be a subset of its parent's")
	// errSealed means that Vault is sealed. It serves nothing until an operator unseals it.
	errSealed = errors.New("vault: sealed")
	// errNoSession means that the broker is not logged in to Vault.
	errNoSession = errors.New("vault: not logged in")
	// errNotSent means that the request certainly did not leave the process.
	errNotSent = errors.New("the request was not sent")
	// errNotWritten means that the request certainly did not leave the process, although it had a connection.
	errNotWritten = errors.New("the connection was closed before the request was written")
	// errTooLarge means that a response exceeded its limit.
	errTooLarge = errors.New("vault's response exceeds the size limit")
	// errShape means that a response is malformed.
	errShape = errors.New("vault's response is malformed")
	errCase  = fmt.Errorf("%w: it spells a known member in another case", errShape)
	// errRights means that Vault gave a token other rights than the request asked for.
	errRights = errors.New("its rights differ from the request")
	// errSkew means that the clocks differ by more than [broker.MaxSkew].
	errSkew = errors.New("the clocks of the broker and of vault differ")
	// errStatus stands for a failure with a status of no other row.
	errStatus = errors.New("vault returned another status")
)
