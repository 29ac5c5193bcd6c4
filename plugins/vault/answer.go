package vault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// answer is what we read of a Vault response.
type answer struct {
	LeaseID       string
	LeaseDuration int64          // seconds
	Data          map[string]any // numbers are json.Number; nil when absent or null
	Auth          *auth
	Wrap          *wrap
	Errors        []string
	Raw           []byte // what was asked for as it is
}

// auth is the part of an answer that describes a new or renewed token.
type auth struct {
	Token         string
	Accessor      string
	LeaseDuration int64 // seconds
	Renewable     bool
	Orphan        bool
	Type          string
	Policies      []string // the token's own
	Identity      []string // added by an entity or group
	Members       map[string]any
}

// maxDepth bounds the nesting of an answer.
const maxDepth = 32

var (
	errShape = errors.New("vault's answer does not have the shape of one")
	errCase  = errors.New("vault's answer has a member in another case than Vault writes it")
)

// decodeAnswer reads exactly one JSON object. Duplicate members, members that differ from a
// known one in case alone, invalid UTF-8, nesting beyond 32 and anything after the object are
// refused: a proxy that adds a second lease_id must not choose which one we revoke. Its errors
// quote nothing of raw.
func decodeAnswer(raw []byte) (a answer, err error) {
	d := decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}
	err = d.object(1, map[string]func() error{
		"lease_id":       func() error { return d.text(&a.LeaseID) },
		"lease_duration": func() error { return d.integer(&a.LeaseDuration) },
		"data":           func() (err error) { a.Data, err = d.data(); return err },
		"auth":           func() (err error) { a.Auth, err = d.auth(); return err },
		"errors":         func() error { return d.texts(&a.Errors) },
		"wrap_info":      func() (err error) { a.Wrap, err = d.wrap(); return err },
	})
	if err != nil {
		return answer{}, err
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return answer{}, errShape
	}
	return a, nil
}

// decoder adds to the token reader, which itself refuses duplicates and invalid UTF-8, the
// shapes we expect. Its errors are errShape or errCase: the reader's own quote the input.
type decoder struct{ *jsontext.Decoder }

// object reads an object, handing each member in known to its reader and skipping the others.
func (d decoder) object(depth int, known map[string]func() error) error {
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' || depth > maxDepth {
		return errShape
	}
	for d.PeekKind() != '}' {
		t, err := d.ReadToken()
		if err != nil || t.Kind() != '"' {
			return errShape
		}
		read, err := lookUp(known, t.String())
		if err == nil && read != nil {
			err = read()
		} else if err == nil && d.SkipValue() != nil {
			err = errShape
		}
		if err != nil {
			return err
		}
	}
	if _, err := d.ReadToken(); err != nil {
		return errShape
	}
	return nil
}

func lookUp(known map[string]func() error, name string) (func() error, error) {
	if read, ok := known[name]; ok {
		return read, nil
	}
	for k := range known {
		if strings.EqualFold(k, name) {
			return nil, errCase
		}
	}
	return nil, nil
}

// null consumes a null and reports whether there was one.
func (d decoder) null() bool {
	if d.PeekKind() != 'n' {
		return false
	}
	_, err := d.ReadToken()
	return err == nil
}

func (d decoder) text(s *string) error {
	t, err := d.ReadToken()
	if err != nil || t.Kind() != '"' {
		return errShape
	}
	*s = t.String()
	return nil
}

func (d decoder) integer(n *int64) error {
	t, err := d.ReadToken()
	if err != nil || t.Kind() != '0' {
		return errShape
	}
	v, err := json.Number(t.String()).Int64()
	if err != nil {
		return errShape
	}
	*n = v
	return nil
}

func (d decoder) boolean(b *bool) error {
	t, err := d.ReadToken()
	if err != nil || t.Kind() != 't' && t.Kind() != 'f' {
		return errShape
	}
	*b = t.Kind() == 't'
	return nil
}

func (d decoder) texts(list *[]string) error {
	if d.null() {
		return nil
	}
	if t, err := d.ReadToken(); err != nil || t.Kind() != '[' {
		return errShape
	}
	for d.PeekKind() == '"' {
		var s string
		if err := d.text(&s); err != nil {
			return err
		}
		*list = append(*list, s)
	}
	if t, err := d.ReadToken(); err != nil || t.Kind() != ']' {
		return errShape
	}
	return nil
}

// auth reads the member twice: once for us, strictly, and once as it is, for a mint whose answer
// is a token.
func (d decoder) auth() (*auth, error) {
	if d.null() {
		return nil, nil
	}
	raw, err := d.ReadValue()
	if err != nil {
		return nil, errShape
	}
	var a auth
	own := decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}
	err = own.object(2, map[string]func() error{
		"client_token":      func() error { return own.text(&a.Token) },
		"accessor":          func() error { return own.text(&a.Accessor) },
		"lease_duration":    func() error { return own.integer(&a.LeaseDuration) },
		"renewable":         func() error { return own.boolean(&a.Renewable) },
		"orphan":            func() error { return own.boolean(&a.Orphan) },
		"token_type":        func() error { return own.text(&a.Type) },
		"token_policies":    func() error { return own.texts(&a.Policies) },
		"identity_policies": func() error { return own.texts(&a.Identity) },
	})
	if err != nil {
		return nil, err
	}
	a.Members, err = decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}.data()
	return &a, err
}

func (d decoder) data() (map[string]any, error) {
	if d.null() {
		return nil, nil
	}
	v, err := d.value(2)
	if err != nil {
		return nil, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errShape
	}
	return m, nil
}

// value reads any value; numbers keep their digits.
func (d decoder) value(depth int) (any, error) {
	t, err := d.ReadToken()
	if err != nil || depth > maxDepth {
		return nil, errShape
	}
	switch t.Kind() {
	case '"':
		return t.String(), nil
	case '0':
		return json.Number(t.String()), nil
	case 't', 'f':
		return t.Bool(), nil
	case 'n':
		return nil, nil
	case '[':
		return d.array(depth)
	case '{':
		return d.members(depth)
	}
	return nil, errShape
}

func (d decoder) array(depth int) (any, error) {
	list := []any{}
	for d.PeekKind() != ']' {
		v, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, errShape
	}
	return list, nil
}

func (d decoder) members(depth int) (any, error) {
	m := map[string]any{}
	for d.PeekKind() != '}' {
		t, err := d.ReadToken()
		if err != nil {
			return nil, errShape
		}
		name := t.String()
		if m[name], err = d.value(depth + 1); err != nil {
			return nil, err
		}
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, errShape
	}
	return m, nil
}

// failure is an answer other than success. Its text holds no value of a request: of Vault's
// own words only those in the list below are kept, since an engine may quote the statement
// that failed, password and all.
type failure struct {
	status int
	says   string // one of the phrases, or empty
}

var phrases = []string{
	"permission denied", "Vault is sealed", "invalid lease", "invalid accessor", "token not found",
	"child policies must be subset of parent", "must be subset of the role's allowed policies",
	"missing client token", "bad token", "invalid token", "path is already in use",
	"missing name in alias", "invalid certificate or no client certificate supplied",
	"client certificate must be supplied", "unsupported path", "no handler for route",
	"request body too large", "rate limit quota exceeded", "unknown role",
	"error validating token", "service account name not authorized", "lease not found",
}

func newFailure(status int, raw []byte) *failure {
	f := &failure{status: status}
	a, err := decodeAnswer(raw)
	if err != nil {
		return f
	}
	for _, e := range a.Errors {
		for _, p := range phrases {
			if f.says == "" && strings.Contains(e, p) {
				f.says = p
			}
		}
	}
	return f
}

func (f *failure) Error() string {
	if f.says == "" {
		return fmt.Sprintf("vault answered %d", f.status)
	}
	return fmt.Sprintf("vault answered %d: %s", f.status, f.says)
}

// Is gives the sentinels their meaning.
func (f *failure) Is(target error) bool {
	switch target {
	case errForbidden:
		return f.status == 403
	case errWider:
		return f.says == "child policies must be subset of parent" || f.says == "must be subset of the role's allowed policies"
	case errSealed:
		return f.status == 503 && f.says == "Vault is sealed"
	}
	return false
}

// What Vault may say, for errors.Is.
var (
	// errForbidden is Vault's 403. At a revocation it is an alarm, never "already gone".
	errForbidden = errors.New("vault: permission denied")
	// errWider is Vault's refusal of a token that could do more than its parent, or than the
	// token role for roots allows.
	errWider = errors.New("vault: a token's policies must be a subset of its parent's")
	// errSealed is a sealed Vault: nothing is done until somebody unseals it.
	errSealed = errors.New("vault: sealed")
	// errNoSession says that the broker is not logged in to Vault.
	errNoSession = errors.New("vault: not logged in")
)
