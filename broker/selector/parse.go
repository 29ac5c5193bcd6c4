package selector

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// Limits of a selector.
const (
	MaxBytes = 4 << 10 // as written, and in canonical spelling
	MaxDepth = 32      // nested parentheses and nots
	MaxTerms = 256
)

// Parse reads the language of [Selector]. Its errors name the position, counted in characters from 1, the expected
// text, and the nearest term for a misspelt one.
func Parse(s string) (Selector, error) { return parse(parser{text: s}) }

// ParseRecorded is [Parse] for a selector in the ledger's records. An earlier build also accepted a vault term that no
// tool's path can have. Such a term still parses, and matches nothing: an unreadable rule would stop the broker.
func ParseRecorded(s string) (Selector, error) { return parse(parser{text: s, recorded: true}) }

func parse(p parser) (Selector, error) {
	s := p.text
	if len(s) > MaxBytes {
		return Selector{}, fmt.Errorf("selector is longer than %d bytes", MaxBytes)
	}
	if !utf8.ValidString(s) {
		return Selector{}, errors.New("selector is not valid UTF-8")
	}
	root, err := p.either()
	if err == nil && p.pos < len(s) {
		err = p.expected(`"and", "or" or the end`)
	}
	if err != nil {
		return Selector{}, err
	}
	if len(root.String()) > MaxBytes {
		return Selector{}, fmt.Errorf("selector is longer than %d bytes in canonical spelling", MaxBytes)
	}
	return Selector{root}, nil
}

type parser struct {
	text  string
	pos   int // of the next token, in bytes
	depth int
	terms int

	recorded bool // see ParseRecorded
}

// errorAt makes an error about a byte of the text.
func (p *parser) errorAt(pos int, format string, args ...any) error {
	at := utf8.RuneCountInString(p.text[:pos]) + 1
	return fmt.Errorf("selector, character %d: %s", at, fmt.Sprintf(format, args...))
}

func (p *parser) expected(what string) error {
	found := "the end"
	if rest := p.text[p.pos:]; rest != "" {
		end := strings.IndexAny(rest, wordEnds)
		switch end {
		case -1:
			end = len(rest)
		case 0:
			end = 1
		}
		found = fmt.Sprintf("%.40q", rest[:end])
	}
	return p.errorAt(p.pos, "expected %s, found %s", what, found)
}

// A word of the language ends before a byte of wordEnds.
const (
	blanks   = " \t\r\n"
	wordEnds = blanks + "()"
)

func (p *parser) space() {
	p.pos = len(p.text) - len(strings.TrimLeft(p.text[p.pos:], blanks))
}

// word consumes w if it is the whole next word.
func (p *parser) word(w string) bool {
	rest, ok := strings.CutPrefix(p.text[p.pos:], w)
	if !ok || rest != "" && strings.IndexByte(wordEnds, rest[0]) < 0 {
		return false
	}
	p.pos += len(w)
	p.space()
	return true
}

func (p *parser) either() (*node, error) { return p.joined("or", p.both) }
func (p *parser) both() (*node, error)   { return p.joined("and", p.single) }

// joined reads the operands of one operator.
func (p *parser) joined(op string, operand func() (*node, error)) (*node, error) {
	var parts []*node
	for {
		n, err := operand()
		if err != nil {
			return nil, err
		}
		parts = append(parts, n)
		if p.word(op) {
			continue
		}
		if len(parts) == 1 {
			return n, nil
		}
		return &node{op: op, parts: parts}, nil
	}
}

// single reads a term, a parenthesis, or the negation of one.
func (p *parser) single() (*node, error) {
	p.space()
	start := p.pos
	negated := p.word("not")
	if !negated && !strings.HasPrefix(p.text[p.pos:], "(") {
		if p.terms++; p.terms > MaxTerms {
			return nil, p.errorAt(start, "more than %d terms", MaxTerms)
		}
		return p.term()
	}
	if p.depth++; p.depth > MaxDepth {
		return nil, p.errorAt(start, "nested deeper than %d", MaxDepth)
	}
	defer func() { p.depth-- }()
	if !negated {
		return p.parenthesis()
	}
	n, err := p.single()
	if err != nil {
		return nil, err
	}
	return &node{op: "not", parts: []*node{n}}, nil
}

func (p *parser) parenthesis() (*node, error) {
	p.pos++
	n, err := p.either()
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(p.text[p.pos:], ")") {
		return nil, p.expected(`"and", "or" or ")"`)
	}
	p.pos++
	p.space()
	return n, nil
}

func (p *parser) term() (*node, error) {
	start := p.pos
	rest := p.text[start:]
	end := strings.IndexFunc(rest, func(r rune) bool { return !isBare(r) || r == ':' })
	if end < 0 {
		end = len(rest)
	}
	if end == 0 {
		return nil, p.expected(`a term such as chain:…, "not" or "("`)
	}
	key, name, named := strings.Cut(rest[:end], ".")
	if err := p.checkKey(start, key, name, named); err != nil {
		return nil, err
	}
	if p.pos += end; !strings.HasPrefix(p.text[p.pos:], ":") {
		return nil, p.expected(fmt.Sprintf(`":" and a value after %q`, rest[:end]))
	}
	p.pos++
	at := p.pos
	value, err := p.value()
	if err != nil {
		return nil, err
	}
	t, err := newTerm(key, name, value, p.recorded)
	if err != nil {
		return nil, p.errorAt(at, "%v", err)
	}
	return &node{term: t}, nil
}

// value reads a bare or quoted value up to the end of the word.
func (p *parser) value() (value string, err error) {
	at, rest := p.pos, p.text[p.pos:]
	if strings.HasPrefix(rest, `"`) {
		literal, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return "", p.errorAt(at, "expected a value quoted as in Go")
		}
		if value, err = strconv.Unquote(literal); err != nil || !utf8.ValidString(value) {
			return "", p.errorAt(at, "expected a quoted value that is valid UTF-8")
		}
		p.pos += len(literal)
	} else {
		end := strings.IndexFunc(rest, func(r rune) bool { return !isBare(r) })
		if end < 0 {
			end = len(rest)
		}
		if value = rest[:end]; value == "" {
			return "", p.expected("a value right after the colon")
		}
		p.pos += end
	}
	if rest = p.text[p.pos:]; rest != "" && strings.IndexByte(wordEnds, rest[0]) < 0 {
		return "", p.expected("a space after the value; quote a value with other characters")
	}
	p.space()
	return value, nil
}

var keys = []string{"chain", "subtree", "grant", "spiffe", "task", "tool", "arg.NAME", "vault", "bundle",
	"leaked", "label.NAME", "since", "until"}

// checkKey refuses an unknown term, and suggests the nearest one.
func (p *parser) checkKey(pos int, key, name string, named bool) error {
	spelt := key
	if named {
		spelt += ".NAME"
	}
	switch {
	case key == "arg" && name != "" && args.CheckName(name) != nil:
		return p.errorAt(pos, "%v", args.CheckName(name))
	case slices.Contains(keys, spelt) && named == (name != ""):
		return nil
	case slices.Contains(keys, key+".NAME"):
		return p.errorAt(pos, "expected a name in %s.NAME", key)
	case named && slices.Contains(keys, key):
		return p.errorAt(pos, "expected %s without a name", key)
	case key == "hash":
		return p.errorAt(pos, "there is no term hash: "+
			"for a leaked value write leaked:sha256:…, which pawl leaked prints")
	}
	best, hint := 3, ""
	for _, known := range append([]string{"and", "or", "not"}, keys...) {
		bare := strings.TrimSuffix(known, ".NAME")
		if d := editDistance(strings.ToLower(key), bare); d < best && d < len(bare) && key != bare {
			best, hint = d, fmt.Sprintf("; did you mean %s?", known)
		}
	}
	return p.errorAt(pos, "unknown term %.40q%s; expected one of %s", key, hint, strings.Join(keys, ", "))
}

// editDistance counts the letters to replace, insert, delete or swap with their neighbour.
func editDistance(a, b string) int {
	if len(a) > 16 {
		return len(a)
	}
	d := make([][]int, len(a)+1)
	for i := range d {
		d[i] = make([]int, len(b)+1)
		for j := range d[i] {
			switch {
			case i == 0 || j == 0:
				d[i][j] = i + j
			case a[i-1] == b[j-1]:
				d[i][j] = d[i-1][j-1]
			default:
				d[i][j] = 1 + min(d[i-1][j-1], d[i-1][j], d[i][j-1])
				if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
					d[i][j] = min(d[i][j], 1+d[i-2][j-2])
				}
			}
		}
	}
	return d[len(a)][len(b)]
}

// newTerm checks a value and converts it to canonical spelling.
func newTerm(key, name, value string, recorded bool) (t term, err error) {
	t = term{key: key, name: name, value: value}
	switch key {
	case "chain":
		_, err = broker.ParseChainID(value)
	case "subtree":
		_, err = broker.ParseDelegationID(value)
	case "grant":
		_, err = broker.ParseGrantID(value)
	case "tool":
		_, err = broker.ParseToolName(value)
	case "spiffe":
		err = checkSPIFFE(value)
	case "vault":
		path := strings.TrimSuffix(value, "/*")
		_, wrong := broker.ParseVaultPath(path)
		if harmless := recorded && path != "" && !strings.Contains(path, "*"); wrong != nil && !harmless {
			err = fmt.Errorf("expected a Vault mount and role, or a mount and /*: %w", wrong)
		}
	case "leaked":
		t.digest, err = checkLeaked(value)
	case "since", "until":
		t.at, err = time.Parse(time.RFC3339, value)
		t.at = t.at.UTC()
		if y := t.at.Year(); err != nil || y < 1 || y > 9999 {
			return t, errors.New("expected a time such as 2026-01-02T03:04:05Z")
		}
		t.value = t.at.Format(time.RFC3339Nano)
	case "task", "bundle":
		if value == "" {
			err = errors.New("expected a value that is not empty")
		}
	}
	return t, err
}

// checkSPIFFE accepts the ID of a workload, and a prefix that ends in "/*".
func checkSPIFFE(s string) error {
	if len(s) > broker.MaxSPIFFEID {
		return fmt.Errorf("expected a SPIFFE ID of at most %d bytes", broker.MaxSPIFFEID)
	}
	prefix, below := strings.CutSuffix(s, "/*")
	id, err := spiffeid.FromString(prefix)
	switch {
	case err != nil:
		return errors.New("expected a SPIFFE ID such as spiffe://example.org/agent, or one that ends in /*")
	case !below && id.Path() == "":
		return errors.New("expected the SPIFFE ID of a workload; a whole trust domain is " + s + "/*")
	}
	return nil
}
