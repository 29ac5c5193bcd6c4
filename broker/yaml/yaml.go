// Package yaml reads the YAML of policies and of the configuration: strictly, and in bounded time.
package yaml

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/scanner"
	"github.com/goccy/go-yaml/token"
)

// Limits of a file. The YAML reader's time grows with the square of a line's length, of a run of blank lines and of
// the depth. Files that people write are small, narrow and flat.
const (
	maxNesting = 32
	maxIndent  = 128  // columns
	maxLine    = 4096 // bytes
	maxBlank   = 64   // blank lines in a row
	maxTokens  = 65_536
	maxKeys    = 1024 // in one map
	maxKey     = 128  // bytes
)

// MaxFile is the largest size of a file in bytes.
const MaxFile = 256 << 10

// ErrNoDocument is in the error for an empty file.
var ErrNoDocument = errors.New("holds no document; exactly one document is required")

var errDocuments = errors.New("holds more than one document; exactly one document is required")

// Read decodes one document strictly and in bounded time, whatever the bytes are. Unknown and repeated keys,
// anchors, aliases, merge keys, tags and a second document are errors. Errors begin with "file:line: ", or with "line
// N: " where file is empty.
func Read(file string, raw []byte, v any) error {
	if err := checkLimits(raw); err != nil {
		return located(file, err)
	}
	body, err := parseOne(raw)
	if err != nil {
		return located(file, err)
	}
	return located(file, yaml.NewDecoder(bytes.NewReader(nil), yaml.Strict()).DecodeFromNode(body, v))
}

// parseOne parses the only document.
func parseOne(raw []byte) (ast.Node, error) {
	// Not lexer.Tokenize: it restarts after each error and collects all of them, one for each byte of a line of @.
	var s scanner.Scanner
	s.Init(string(raw))
	found, err := s.Scan()
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var tokens token.Tokens
	tokens.Add(found...) // Add links them
	if err := checkTokens(tokens); err != nil {
		return nil, err
	}
	f, err := parser.Parse(tokens, 0)
	if err != nil {
		return nil, err
	}
	switch {
	case len(f.Docs) == 0 || len(f.Docs) == 1 && f.Docs[0].Body == nil:
		return nil, ErrNoDocument
	case len(f.Docs) > 1:
		return nil, errDocuments
	}
	var p plain
	ast.Walk(&p, f.Docs[0].Body)
	if p.forbidden != nil {
		return nil, lineError{line(p.forbidden), "anchors, aliases, merge keys and tags are not allowed; write the value itself"}
	}
	if p.key != nil {
		return nil, lineError{line(p.key), "a key is no text; put it in quotes"}
	}
	return f.Docs[0].Body, nil
}

// checkTokens applies the limits before parsing. The parser recurses for each further document and each further key
// of a block. It copies its state each time, and keeps the path of every value.
func checkTokens(tokens token.Tokens) error {
	if len(tokens) > maxTokens {
		return fmt.Errorf("holds more than %d keys, values and marks; split it", maxTokens)
	}
	var (
		marks  = map[token.Type]int{}
		blocks []block // the open blocks, by column
	)
	for _, t := range tokens {
		marks[t.Type]++
		if marks[token.DocumentHeaderType] > 1 || marks[token.DocumentEndType] > 1 {
			return errDocuments
		}
		if t.Type == token.MappingValueType && t.Prev != nil && len(t.Prev.Value) > maxKey {
			return lineError{t.Position.Line, fmt.Sprintf("a key is longer than %d bytes; shorten it", maxKey)}
		}
		flow := marks[token.MappingStartType] + marks[token.SequenceStartType] - marks[token.MappingEndType] - marks[token.SequenceEndType]
		if ends := t.Type == token.MappingEndType || t.Type == token.SequenceEndType; flow > 0 || ends || t.Type == token.CommentType {
			continue // these may appear in any column
		}
		for len(blocks) > 0 && blocks[len(blocks)-1].column > t.Position.Column {
			blocks = blocks[:len(blocks)-1]
		}
		if t.Next == nil || t.Next.Type != token.MappingValueType && t.Type != token.MappingKeyType {
			continue
		}
		if len(blocks) == 0 || blocks[len(blocks)-1].column < t.Position.Column {
			blocks = append(blocks, block{column: t.Position.Column})
		}
		last := &blocks[len(blocks)-1]
		if last.keys++; last.keys > maxKeys {
			return lineError{t.Position.Line, fmt.Sprintf("the map has more than %d keys; remove some", maxKeys)}
		}
	}
	return nil
}

// block is a map with all keys in one column.
type block struct{ column, keys int }

// lineError is an error of this package with a line number.
type lineError struct {
	line int
	text string
}

func (e lineError) Error() string { return e.text }

// checkLimits applies the limits to the text before the YAML reader sees it.
func checkLimits(raw []byte) error {
	if len(raw) > MaxFile {
		return fmt.Errorf("larger than %d bytes", MaxFile)
	}
	n, depth, blank := 0, 0, 0
	for text := range bytes.Lines(raw) {
		n++
		var err error
		if depth, err = checkLine(text, depth); err != nil {
			return lineError{n, err.Error()}
		}
		if blank++; len(bytes.TrimSpace(text)) > 0 {
			blank = 0
		}
		if blank > maxBlank {
			return lineError{n, fmt.Sprintf("more than %d blank lines in a row; remove some", maxBlank)}
		}
	}
	return nil
}

// checkLine checks one line for nesting: indentation, brackets, and the dashes and question marks that open several
// levels at once. It returns the depth of the brackets that are open after the line.
func checkLine(text []byte, depth int) (int, error) {
	if !utf8.Valid(text) {
		return 0, errors.New("is not UTF-8")
	}
	rest := bytes.TrimLeft(text, " -?:")
	lead := text[:len(text)-len(rest)]
	deep := len(lead)-bytes.Count(lead, []byte(" ")) > maxNesting || len(text)-len(bytes.TrimLeft(text, " ")) > maxIndent
	for _, c := range rest {
		switch c {
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		}
		deep = deep || depth > maxNesting
	}
	if deep {
		return 0, fmt.Errorf("nested more than %d deep or indented more than %d columns; flatten it", maxNesting, maxIndent)
	}
	if len(text) > maxLine {
		return 0, fmt.Errorf("longer than %d bytes; break it into several lines", maxLine)
	}
	return depth, nil
}

// plain finds nodes that give a document more meaning than it shows, or less. The decoder treats a map with a key
// that is not a string, such as a number, as an empty map.
type plain struct{ forbidden, key ast.Node }

func (p *plain) Visit(n ast.Node) ast.Visitor {
	switch n := n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode, *ast.TagNode:
		p.forbidden = n
	case *ast.MappingValueNode:
		if _, text := n.Key.(*ast.StringNode); !text {
			p.key = n.Key
		}
	}
	return p
}

func line(n ast.Node) int {
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

// located rewrites the reader's error, which quotes several lines of source, as one line.
func located(file string, err error) error {
	var (
		parsed  yaml.Error
		scanned *scanner.InvalidTokenError
		ours    lineError
		at      int
		text    string
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &ours):
		at, text = ours.line, ours.text
	case errors.As(err, &scanned):
		at, text = scanned.Token.Position.Line, scanned.Token.Error
	case errors.As(err, &parsed) && parsed.GetToken() != nil:
		at, text = parsed.GetToken().Position.Line, parsed.GetMessage()
	case file == "":
		return err
	default:
		return fmt.Errorf("%s: %w", file, err)
	}
	if file == "" {
		return fmt.Errorf("line %d: %s", at, text)
	}
	return fmt.Errorf("%s:%d: %s", file, at, text)
}

// Row is a list element that remembers its line.
type Row[T any] struct {
	Value T
	Line  int
}

// UnmarshalYAML decodes the element.
func (r *Row[T]) UnmarshalYAML(n ast.Node) error {
	r.Line = line(n)
	return yaml.NodeToValue(n, &r.Value, yaml.Strict())
}

// AsJSON encodes a decoded YAML value as JSON, for parsers of this project that read JSON.
func AsJSON(v any) (json.RawMessage, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, errors.New("must consist of maps with string keys, lists and scalars")
	}
	return raw, nil
}
