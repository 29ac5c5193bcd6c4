package agent

import (
	"errors"
	"strings"

	"github.com/pawlsec/pawl/broker/api"
)

// An id is two letters for its kind and 24 characters of 0-9 and a-z without i, l, o and u. Each kind
// has its own type, so that the compiler refuses a grant's id in place of a delegation's. An id is no
// authority: the broker checks the identity of every caller. Parse an id that arrives as text.
type (
	// ChainID names a chain, "ch…".
	ChainID string
	// DelegationID names a delegation, "dl…". One agent sends it to another, which joins it.
	DelegationID string
	// GrantID names the broker's record of a step, "gr…".
	GrantID string
	// RevocationID names a revocation, "rv…". An operator finds the revocation by it.
	RevocationID string
)

// ParseChainID accepts the one form of a chain's id. Other text is ErrMalformed.
func ParseChainID(s string) (ChainID, error) { return parseID[ChainID](s, "chain", "ch") }

// ParseDelegationID accepts the one form of a delegation's id. Other text is ErrMalformed.
func ParseDelegationID(s string) (DelegationID, error) {
	return parseID[DelegationID](s, "delegation", "dl")
}

// ParseGrantID accepts the one form of a grant's id. Other text is ErrMalformed.
func ParseGrantID(s string) (GrantID, error) { return parseID[GrantID](s, "grant", "gr") }

// ParseRevocationID accepts the one form of a revocation's id. Other text is ErrMalformed.
func ParseRevocationID(s string) (RevocationID, error) {
	return parseID[RevocationID](s, "revocation", "rv")
}

// RevocationOf returns the id of the revocation in err, and false if err has none.
func RevocationOf(err error) (RevocationID, bool) {
	var p *Error
	if !errors.As(err, &p) {
		return "", false
	}
	id, wrong := ParseRevocationID(p.Revocation)
	return id, wrong == nil
}

const (
	idLength   = 26
	idAlphabet = "0123456789abcdefghjkmnpqrstvwxyz"
)

// parseID does not quote s in its error: s may be a secret that was passed by mistake.
func parseID[ID ~string](s, kind, prefix string) (ID, error) {
	if len(s) != idLength || s[:2] != prefix || strings.TrimLeft(s[2:], idAlphabet) != "" {
		return "", api.NewProblem(ErrMalformed, "",
			"the id of a "+kind+` is "`+prefix+`" and 24 characters of 0-9 and a-z without i, l, o and u`)
	}
	return ID(s), nil
}

// answerID parses an id in an answer. It stores an error in *err unless there is one already.
func answerID[ID ~string](s string, parse func(string) (ID, error), err *error) ID {
	id, wrong := parse(s)
	if wrong != nil && *err == nil {
		*err = api.NewProblem(ErrUnavailable, api.CodeNoAnswer, "the answer is malformed: "+wrong.Error())
	}
	return id
}
