package vault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// response holds the members of a Vault response that the client reads.
type response struct {
	RequestID     string // as in Vault's audit log; empty: none that a ledger could keep
	LeaseID       string
	LeaseDuration int64          // seconds
	Data          map[string]any // numbers are json.Number; nil when absent or null
	Auth          *auth
	Wrap          *wrapInfo
	Errors        []string
	Raw           []byte // the body of a raw call, undecoded
	ServerTime    int64  // seconds since 1970, of sys/health; zero: none
}

// auth is the member of a response that describes a new or renewed token.
type auth struct {
	Token         string
	Accessor      string
	LeaseDuration int64 // seconds
	Renewable     bool
	Orphan        bool
	Type          string
	Policies      []string // the token's own
	Identity      []string // added by an entity or group
	Entity        string   // its id
	Members       map[string]any
}

// maxRequestID bounds the id of a request. Vault's have 36 characters.
const maxRequestID = 64

// maxDepth bounds the nesting of a response.
const maxDepth = 32

// decodeResponse reads exactly one JSON object. It refuses duplicate members, members that differ from a known one in
// case alone, invalid UTF-8, nesting beyond 32 and anything after the object. Otherwise a proxy that adds a second
// lease_id could choose which lease we revoke. Its errors quote nothing of raw.
func decodeResponse(raw []byte) (resp response, err error) {
	d := decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}
	err = d.object(1, map[string]func() error{
		"lease_id":       func() error { return d.text(&resp.LeaseID) },
		"lease_duration": func() error { return d.integer(&resp.LeaseDuration) },
		"data":           func() (err error) { resp.Data, err = d.data(); return err },
		"auth":           func() (err error) { resp.Auth, err = d.auth(); return err },
		"errors":         func() error { return d.texts(&resp.Errors) },
		"wrap_info":      func() (err error) { resp.Wrap, err = d.wrap(); return err },

		"request_id": func() error {
			err := d.optionalText(&resp.RequestID)
			if len(resp.RequestID) > maxRequestID || !validToken(resp.RequestID) {
				resp.RequestID = ""
			}
			return err
		},
		"server_time_utc": func() error { return d.integer(&resp.ServerTime) },
	})
	if err != nil {
		return response{}, err
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return response{}, errShape
	}
	return resp, nil
}

// decoder checks the expected shapes on top of the token reader, which itself refuses duplicates and invalid UTF-8. It
// returns errShape or errCase only, because the reader's own errors quote the input.
type decoder struct{ *jsontext.Decoder }

// object reads an object. It passes each known member to its reader and skips the others.
func (d decoder) object(depth int, known map[string]func() error) error {
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' || depth > maxDepth {
		return errShape
	}
	for d.PeekKind() != '}' {
		t, err := d.ReadToken()
		if err != nil || t.Kind() != '"' {
			return errShape
		}
		read, err := memberReader(known, t.String())
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

func memberReader(known map[string]func() error, name string) (func() error, error) {
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

// optionalText takes a null for an empty text.
func (d decoder) optionalText(s *string) error {
	if d.null() {
		return nil
	}
	return d.text(s)
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

// auth reads the member twice: strictly, for the client, and in full, for a mint that returns a token.
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
		"entity_id":         func() error { return own.optionalText(&a.Entity) },
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

// value reads any value. Numbers keep their digits.
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

// badToken reports whether Vault does not know the token of the request, or it has ended.
func (f *failure) badToken() bool { return f.phrase == "invalid token" || f.phrase == "bad token" }

// newFailure returns the failure of an answer with an error status.
func newFailure(status int, header http.Header, raw []byte) *failure {
	f := &failure{status: status, retryAfter: retryAfter(header)}
	if resp, err := decodeResponse(raw); err == nil {
		f.phrase = phraseOf(resp.Errors)
	}
	return f
}

// wrapInfo is the member of a response that describes a wrapping token: a single-use token without a parent that opens
// the response that Vault keeps.
type wrapInfo struct {
	Token           string
	Accessor        string
	TTL             int64  // seconds
	CreationPath    string // the path of the wrapped request
	WrappedAccessor string // accessor of the wrapped token
	Members         map[string]any
}

func (d decoder) wrap() (*wrapInfo, error) {
	if d.null() {
		return nil, nil
	}
	raw, err := d.ReadValue()
	if err != nil {
		return nil, errShape
	}
	var w wrapInfo
	own := decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}
	err = own.object(2, map[string]func() error{
		"token":            func() error { return own.text(&w.Token) },
		"accessor":         func() error { return own.text(&w.Accessor) },
		"ttl":              func() error { return own.integer(&w.TTL) },
		"creation_path":    func() error { return own.text(&w.CreationPath) },
		"wrapped_accessor": func() error { return own.text(&w.WrappedAccessor) },
	})
	if err != nil {
		return nil, err
	}
	w.Members, err = decoder{jsontext.NewDecoder(bytes.NewBuffer(raw))}.data()
	return &w, err
}

// checkToken checks that a response carries a token of the given type.
func (resp response) checkToken(kind string) error {
	switch {
	case resp.Auth == nil || !validToken(resp.Auth.Token) || !validToken(resp.Auth.Accessor) || resp.Wrap != nil:
		return errors.New("vault's response carries no token")
	case resp.Auth.Type != kind:
		return fmt.Errorf("vault's token is not of type %s", kind)
	case resp.Auth.LeaseDuration <= 0 || resp.Auth.LeaseDuration > maxLeaseSeconds:
		return errors.New("vault's token has no expiry, or one more than ten years away")
	}
	return nil
}

// maxLeaseSeconds is the longest lease duration that a response may have: ten years.
const maxLeaseSeconds = 10 * 366 * 24 * 3600

// validToken reports whether s can be a token or an accessor: printable ASCII without blanks, at most 4,096 bytes.
func validToken(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s != "" && len(s) <= 4096
}
