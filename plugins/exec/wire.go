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

// Version is the protocol's. A plugin answers in the version it was asked in.
const Version = 1

// request is what a plugin reads. It holds no more than the operation needs, and no secret.
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
	w := &tool{Name: t.Name, Narrowing: t.Narrowing, Path: t.Path, Arguments: map[string]parameter{}, Settings: map[string]string{}}
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
	return &grant{ID: g.ID, Tool: g.Tool, Path: g.Path, Args: g.Args, Expires: g.Expires.UTC(), Ref: g.Lease.Ref}
}

func wireGrants(grants []broker.Grant) []grant {
	list := make([]grant, len(grants))
	for i, g := range grants {
		list[i] = *wireGrant(g)
	}
	return list
}

// answer is what a plugin writes: one of the types below.
type answer interface {
	// refused gives the error of an answer that is one, and of one that lacks the version.
	refused(Program) error
}

// head is in every answer, and all of one to load and sever.
type head struct {
	Version int      `json:"version"`
	Error   *failure `json:"error"`
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

// failure is a plugin's own error.
type failure struct {
	Kind    string `json:"kind"` // "malformed", "denied" or "unavailable"
	Message string `json:"message"`
}

func (f *failure) Error() string { return f.Kind + ": " + f.Message }

func (h *head) refused(p Program) error {
	if h.Version != Version {
		return fmt.Errorf("it answers in version %d of the protocol, want %d", h.Version, Version)
	}
	if h.Error == nil {
		return nil
	}
	if !slices.Contains([]string{"malformed", "denied", "unavailable"}, h.Error.Kind) {
		return errors.New("its error has no kind that is known")
	}
	return &failure{h.Error.Kind, p.words(h.Error.Message, 200)}
}

// Limits of an answer.
const (
	maxDepth   = 32
	maxMembers = 32 // of a secret
)

// decode reads exactly one answer. Unknown and duplicate members, members in another case, invalid
// UTF-8, nesting beyond 32 and anything after the answer are refused. Its errors quote nothing.
func decode(raw []byte, into answer) error {
	if deep(raw) {
		return fmt.Errorf("its answer is nested deeper than %d", maxDepth)
	}
	err := json.Unmarshal(raw, into, json.RejectUnknownMembers(true))
	var semantic *json.SemanticError
	var syntactic *jsontext.SyntacticError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &semantic):
		return fmt.Errorf("its answer is not one to this operation, at byte %d", semantic.ByteOffset)
	case errors.As(err, &syntactic):
		return fmt.Errorf("its answer is not JSON, at byte %d", syntactic.ByteOffset)
	}
	return errors.New("its answer is not JSON")
}

// deep reports whether raw is nested beyond maxDepth; what is no JSON is for others to refuse.
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

// check holds a prepared mint to the tool: at its path or below, with data only for a write, and
// with something in it for the agent.
func (a *prepared) check(path []string, write bool) error {
	if len(a.Path) > 0 {
		if err := checkPath(a.Path); err != nil {
			return err
		}
		if len(a.Path) < len(path) || !slices.Equal(a.Path[:len(path)], path) {
			return errors.New("it would mint outside the tool's path")
		}
	}
	if write != (a.Data != nil) {
		return errors.New("data goes with pawl.mint = write, and only with it")
	}
	for name, value := range a.Data {
		if !memberForm.MatchString(name) || len(value) == 0 {
			return errors.New("data has a member with no name of Vault's")
		}
	}
	if len(a.Secret) == 0 || len(a.Secret) > maxMembers {
		return fmt.Errorf("secret names between 1 and %d members of vault's answer", maxMembers)
	}
	for i, name := range a.Secret {
		if !memberForm.MatchString(name) || slices.Contains(a.Secret[:i], name) {
			return errors.New("secret names a member twice, or what cannot be one")
		}
	}
	return nil
}

// words keeps what a plugin says to printable ASCII of limited length, and drops it when it holds
// a value of the plugin's environment: there may be a password among them.
func (p Program) words(s string, limit int) string {
	for _, e := range p.Env {
		if _, value, _ := strings.Cut(e, "="); len(value) >= 4 && strings.Contains(s, value) {
			return "[withheld: it holds a value of the plugin's environment]"
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

// printable reports whether s is printable ASCII of so many bytes.
func printable(s string, least, most int) bool {
	return len(s) >= least && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}
