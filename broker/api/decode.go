package api

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Limits of a request's body.
const (
	MaxBody  = 64 << 10 // bytes
	MaxDepth = 32       // objects and arrays inside each other
)

// Decode reads a request's body into v, a pointer to one of the request types. It takes one
// JSON object and nothing after it, in valid UTF-8, with each member named exactly once and
// in exactly the case that v declares, nested at most [MaxDepth] deep, without null anywhere
// and in at most [MaxBody] bytes. The error says what is wrong in words of its own and repeats
// no value of the body.
func Decode(body []byte, v any) error {
	if len(body) > MaxBody {
		return fmt.Errorf("the body takes more than %d bytes", MaxBody)
	}
	if err := scan(body); err != nil {
		return err
	}
	err := json.Unmarshal(body, v, json.RejectUnknownMembers(true))
	var wrong *json.SemanticError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, json.ErrUnknownName):
		errors.As(err, &wrong)
		return fmt.Errorf("there is no member %.80q", wrong.JSONPointer)
	case errors.As(err, &wrong):
		return fmt.Errorf("member %.80q is of the wrong kind or out of range", wrong.JSONPointer)
	}
	return errors.New("the body is not valid JSON")
}

// scan walks the tokens once, for what the types of Go do not tell apart: null and nothing.
func scan(body []byte) error {
	dec := jsontext.NewDecoder(bytes.NewReader(body))
	if kind := dec.PeekKind(); kind != jsontext.KindBeginObject {
		if _, err := dec.ReadToken(); err != nil {
			return syntax(err)
		}
		return errors.New("the body must be a JSON object")
	}
	for {
		t, err := dec.ReadToken()
		switch {
		case err != nil:
			return syntax(err)
		case t.Kind() == jsontext.KindNull:
			return fmt.Errorf("member %.80q is null: leave out what is not given", dec.StackPointer())
		case dec.StackDepth() > MaxDepth:
			return fmt.Errorf("the body is nested more than %d deep", MaxDepth)
		case dec.StackDepth() > 0:
			continue
		}
		if _, err := dec.ReadToken(); !errors.Is(err, io.EOF) {
			return errors.New("something follows the JSON object")
		}
		return nil
	}
}

// syntax puts a parser's finding into words that quote nothing of the body but a member's name.
func syntax(err error) error {
	var wrong *jsontext.SyntacticError
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("the body is empty: send a JSON object")
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &wrong):
		return fmt.Errorf("member %.80q is given twice", wrong.JSONPointer)
	case errors.As(err, &wrong):
		return fmt.Errorf("the body is not valid JSON in UTF-8, from byte %d on", wrong.ByteOffset)
	}
	return errors.New("the body is not valid JSON")
}
