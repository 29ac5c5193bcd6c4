package exec

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// version is the version of the protocol. A plugin must respond in the version of the request.
const version = 1

// request is the document that a plugin reads. It has only the members that the operation needs, and no secret.
type request struct {
	Version int     `json:"version"`
	Op      string  `json:"op"` // "load", "prepare", "sever", "prove" or "find"
	Tool    *tool   `json:"tool,omitempty"`
	Grant   *grant  `json:"grant,omitempty"`
	Grants  []grant `json:"grants,omitempty"`
}

type tool struct {
	Name      broker.ToolName      `json:"name"`
	Narrowing broker.Narrowing     `json:"narrowing"`
	Path      []string             `json:"path"`
	Arguments map[string]parameter `json:"arguments"`
	Settings  map[string]string    `json:"settings"`
}

type parameter struct {
	Kind     string `json:"kind"`
	Required bool   `json:"required"`
}

type grant struct {
	ID      broker.GrantID  `json:"id"`
	Tool    broker.ToolName `json:"tool"`
	Path    string          `json:"path"`
	Args    args.Args       `json:"args"`
	Expires time.Time       `json:"expires"`
	Ref     string          `json:"ref,omitempty"`
}

func wireTool(t broker.Tool) *tool {
	w := &tool{Name: t.Name, Narrowing: t.Narrowing, Path: t.Path.Segments(), Arguments: map[string]parameter{}, Settings: map[string]string{}}
	for name, p := range t.Arguments {
		w.Arguments[name] = parameter{p.Kind, p.Required}
	}
	for key, value := range t.Settings {
		if !strings.HasPrefix(key, "pawl.") {
			w.Settings[key] = value
		}
	}
	return w
}

func wireGrant(g broker.Grant) *grant {
	return &grant{ID: g.ID, Tool: g.Tool, Path: g.Path.String(), Args: g.Args, Expires: g.Expires.UTC(), Ref: g.Lease.Ref}
}

func wireGrants(grants []broker.Grant) []grant {
	list := make([]grant, len(grants))
	for i, g := range grants {
		list[i] = *wireGrant(g)
	}
	return list
}

// response is the document that a plugin writes: one of the types below.
type response interface {
	// failure returns an error if the response is an error or has the wrong version.
	failure(Program) error
}

// head is part of every response. A response to load or sever has nothing else.
type head struct {
	Version int          `json:"version"`
	Error   *pluginError `json:"error"`
}

type prepared struct {
	head
	Path   []string                  `json:"path"`
	Data   map[string]jsontext.Value `json:"data"`
	Secret []string                  `json:"secret"`
}

type proven struct {
	head
	Evidence []wireEvidence `json:"evidence"`
}

type wireEvidence struct {
	Grant   string `json:"grant"`
	Outcome string `json:"outcome"`
	Check   string `json:"check"`
	Answer  string `json:"answer"`
}

type foundGrants struct {
	head
	Grants []string `json:"grants"`
}

// pluginError is an error that a plugin returned.
type pluginError struct {
	Kind    string `json:"kind"` // "malformed", "denied" or "unavailable"
	Message string `json:"message"`
}

func (e *pluginError) Error() string { return e.Kind + ": " + e.Message }

func (h *head) failure(p Program) error {
	if h.Version != version {
		return fmt.Errorf("its response has version %d of the protocol, want %d", h.Version, version)
	}
	if h.Error == nil {
		return nil
	}
	if !slices.Contains([]string{"malformed", "denied", "unavailable"}, h.Error.Kind) {
		return errors.New("its error has no known kind")
	}
	return &pluginError{h.Error.Kind, p.clean(h.Error.Message, 200)}
}

// Limits of a response.
const (
	maxDepth   = 32
	maxMembers = 32 // of a secret
)

// decode reads exactly one response. It rejects unknown and duplicate members, members in another case, invalid UTF-8,
// nesting beyond 32, and trailing data. Its errors quote nothing from the response.
func decode(raw []byte, into response) error {
	if deep(raw) {
		return fmt.Errorf("its response is nested deeper than %d", maxDepth)
	}
	err := json.Unmarshal(raw, into, json.RejectUnknownMembers(true))
	var semantic *json.SemanticError
	var syntactic *jsontext.SyntacticError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &semantic):
		return fmt.Errorf("its response does not fit the operation, at byte %d", semantic.ByteOffset)
	case errors.As(err, &syntactic):
		return fmt.Errorf("its response is not JSON, at byte %d", syntactic.ByteOffset)
	}
	return errors.New("its response is not JSON")
}

// deep reports whether raw is nested beyond maxDepth. It does not reject invalid JSON: the decoder does.
func deep(raw []byte) bool {
	d := jsontext.NewDecoder(bytes.NewBuffer(raw))
	for {
		_, err := d.ReadToken()
		if d.StackDepth() > maxDepth {
			return true
		}
		if err != nil { // io.EOF too
			return false
		}
	}
}

// mintPath returns the path of the mint: the tool's path, or the one below it that the plugin chose.
func (r *prepared) mintPath(tool broker.VaultPath) (broker.VaultPath, error) {
	if len(r.Path) == 0 {
		return tool, nil
	}
	path, err := broker.VaultPathOf(r.Path...)
	if err != nil {
		return broker.VaultPath{}, err
	}
	if path != tool && !strings.HasPrefix(path.String(), tool.String()+"/") {
		return broker.VaultPath{}, errors.New("it would mint outside the tool's path")
	}
	return path, nil
}

// check compares a prepared mint with the tool. There is data exactly if the mint is a write, and at least one member
// for the agent.
func (r *prepared) check(write bool) error {
	if write != (r.Data != nil) {
		return errors.New("data must be present with pawl.mint = write, and absent otherwise")
	}
	for name, value := range r.Data {
		if !memberForm.MatchString(name) || len(value) == 0 {
			return errors.New("data has a member with an invalid name")
		}
	}
	if len(r.Secret) == 0 || len(r.Secret) > maxMembers {
		return fmt.Errorf("secret must name between 1 and %d members of vault's response", maxMembers)
	}
	for i, name := range r.Secret {
		if !memberForm.MatchString(name) || slices.Contains(r.Secret[:i], name) {
			return errors.New("secret has a duplicate or invalid name")
		}
	}
	return nil
}

// clean limits a plugin's text to printable ASCII and to a length. It withholds a text that contains a value from the
// plugin's environment, because that may be a password.
func (p Program) clean(s string, limit int) string {
	for _, e := range p.Env {
		if _, value, _ := strings.Cut(e, "="); len(value) >= 4 && strings.Contains(s, value) {
			return "[withheld: it contains a value from the plugin's environment]"
		}
	}
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), limit)]
}

// printable reports whether s is printable ASCII without spaces, of minLen to maxLen bytes.
func printable(s string, minLen, maxLen int) bool {
	unprintable := func(r rune) bool { return r <= ' ' || r > '~' }
	return len(s) >= minLen && len(s) <= maxLen && !strings.ContainsFunc(s, unprintable)
}
