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

// Decode decodes a request's body into v, a pointer to one of the request types. It accepts one JSON object with
// nothing after it, in valid UTF-8. Each member must appear exactly once, in exactly the case that v declares. Null
// is refused everywhere. The body is nested at most [MaxDepth] deep and has at most [MaxBody] bytes. The error
// repeats no value of the body.
func Decode(body []byte, v any) error {
	if len(body) > MaxBody {
		return fmt.Errorf("the body is longer than %d bytes", MaxBody)
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
		return fmt.Errorf("unknown member %.80q", wrong.JSONPointer)
	case errors.As(err, &wrong):
		return fmt.Errorf("member %.80q has the wrong type or is out of range", wrong.JSONPointer)
	}
	return errors.New("the body is not valid JSON")
}

// scan checks the tokens for errors that decoding into Go types does not report: null, depth and trailing data.
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
			return fmt.Errorf("member %.80q is null; omit it instead", dec.StackPointer())
		case dec.StackDepth() > MaxDepth:
			return fmt.Errorf("the body is nested more than %d deep", MaxDepth)
		case dec.StackDepth() > 0:
			continue
		}
		if _, err := dec.ReadToken(); !errors.Is(err, io.EOF) {
			return errors.New("there is trailing data after the JSON object")
		}
		return nil
	}
}

// syntax rewrites a parser's error. The new text quotes nothing of the body but a member's name.
func syntax(err error) error {
	var wrong *jsontext.SyntacticError
	switch {
	case errors.Is(err, io.EOF):
		return errors.New("the body is empty; send a JSON object")
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &wrong):
		return fmt.Errorf("member %.80q is given twice", wrong.JSONPointer)
	case errors.As(err, &wrong):
		return fmt.Errorf("the body is not valid JSON in UTF-8, from byte %d on", wrong.ByteOffset)
	}
	return errors.New("the body is not valid JSON")
}
