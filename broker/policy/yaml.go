package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// readYAML decodes one document strictly: unknown and repeated keys, anchors, aliases, tags
// and a second document are errors, which begin with "file:line: ".
func readYAML(file string, raw []byte, v any) error {
	if len(raw) > MaxFile {
		return fmt.Errorf("%s: larger than %d bytes", file, MaxFile)
	}
	if nested(raw) {
		return fmt.Errorf("%s: nested more than %d deep", file, maxNesting)
	}
	f, err := parser.ParseBytes(raw, 0)
	if err != nil {
		return located(file, err)
	}
	if len(f.Docs) != 1 || f.Docs[0].Body == nil {
		return fmt.Errorf("%s: must hold exactly one document", file)
	}
	var p plain
	ast.Walk(&p, f.Docs[0].Body)
	if p.odd != nil {
		return fmt.Errorf("%s:%d: anchors, aliases, merge keys and tags are not used here", file, line(p.odd))
	}
	return located(file, yaml.NewDecoder(bytes.NewReader(nil), yaml.Strict()).DecodeFromNode(f.Docs[0].Body, v))
}

// PlainYAML refuses what would make a file mean more than it shows, and what its reader panics at
// or takes forever over: anchors, aliases, merge keys, tags, deep nesting.
func PlainYAML(raw []byte) error {
	if nested(raw) {
		return fmt.Errorf("nested more than %d deep", maxNesting)
	}
	f, err := parser.ParseBytes(raw, 0)
	if err != nil {
		return errors.New(yaml.FormatError(err, false, true))
	}
	var p plain
	for _, doc := range f.Docs {
		if doc.Body != nil {
			ast.Walk(&p, doc.Body)
		}
	}
	if p.odd != nil {
		return fmt.Errorf("line %d: anchors, aliases, merge keys and tags are not used here", line(p.odd))
	}
	return nil
}

const maxNesting = 32

// nested finds depth before the parser does, whose time grows with its square: brackets, and
// the dashes and question marks that open several levels on one line.
func nested(raw []byte) bool {
	depth := 0
	for text := range bytes.Lines(raw) {
		rest := bytes.TrimLeft(text, " -?:")
		if lead := text[:len(text)-len(rest)]; len(lead)-bytes.Count(lead, []byte(" ")) > maxNesting {
			return true
		}
		for _, c := range rest {
			switch c {
			case '[', '{':
				depth++
			case ']', '}':
				depth--
			}
			if depth > maxNesting {
				return true
			}
		}
	}
	return false
}

// plain finds what would make a document mean more than it shows.
type plain struct{ odd ast.Node }

func (p *plain) Visit(n ast.Node) ast.Visitor {
	switch n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode, *ast.TagNode:
		p.odd = n
	}
	return p
}

func line(n ast.Node) int {
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

// located turns the reader's error, which quotes the source over several lines, into one line.
func located(file string, err error) error {
	var at yaml.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &at) && at.GetToken() != nil:
		return fmt.Errorf("%s:%d: %s", file, at.GetToken().Position.Line, at.GetMessage())
	}
	return fmt.Errorf("%s: %w", file, err)
}

// row is a list's element that remembers its line.
type row[T any] struct {
	value T
	line  int
}

func (r *row[T]) UnmarshalYAML(n ast.Node) error {
	r.line = line(n)
	return yaml.NodeToValue(n, &r.value, yaml.Strict())
}

// asJSON is the JSON of a decoded YAML value, for parsers of our own that read JSON.
func asJSON(v any) (json.RawMessage, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, errors.New("is not made of maps with text keys, lists and scalars")
	}
	return raw, nil
}
