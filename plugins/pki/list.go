package pki

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// MaxList is how many bytes a revocation list may have. It is read whole, so this is also what it takes of the broker's
// memory, and for 1.7 million certificates. A longer one proves nothing, and its certificates are dead at their end.
const MaxList = 64 << 20

// list is what was looked for on a revocation list as relying parties get it.
type list struct {
	issuer string // the authority's name
	made   time.Time
	next   time.Time // when another is due at the latest
	has    map[string]bool
}

var errList = errors.New("what Vault serves is not one revocation list that can be read")

// parseList walks a list in DER, alone (RFC 5280, 5.1), for the serial numbers that are wanted, and keeps nothing
// else of it: a list is as long as what was ever revoked, and a proof is about a few.
func parseList(der []byte, wanted map[string]bool) (list, error) {
	l := list{has: map[string]bool{}}
	in := cryptobyte.String(der)
	var all, tbs, issuer, entries cryptobyte.String
	if !in.ReadASN1(&all, casn1.SEQUENCE) || !in.Empty() || !all.ReadASN1(&tbs, casn1.SEQUENCE) ||
		!all.SkipASN1(casn1.SEQUENCE) || !all.SkipASN1(casn1.BIT_STRING) || !all.Empty() {
		return list{}, errList
	}
	var version int64
	if !tbs.ReadASN1Integer(&version) || version != 1 || !tbs.SkipASN1(casn1.SEQUENCE) || !tbs.ReadASN1Element(&issuer, casn1.SEQUENCE) ||
		!readTime(&tbs, &l.made) || !isTime(tbs) || !readTime(&tbs, &l.next) {
		return list{}, errList
	}
	var name pkix.RDNSequence
	if rest, err := asn1.Unmarshal(issuer, &name); err != nil || len(rest) > 0 {
		return list{}, errList
	}
	l.issuer = name.String()
	var revoked bool
	if !tbs.ReadOptionalASN1(&entries, &revoked, casn1.SEQUENCE) || !tbs.SkipOptionalASN1(casn1.Tag(0).ContextSpecific().Constructed()) || !tbs.Empty() {
		return list{}, errList
	}
	for !entries.Empty() {
		if !l.entry(&entries, wanted) {
			return list{}, errList
		}
	}
	return l, nil
}

// entry reads one entry.
func (l *list) entry(entries *cryptobyte.String, wanted map[string]bool) bool {
	var entry, number cryptobyte.String
	var at time.Time
	if !entries.ReadASN1(&entry, casn1.SEQUENCE) || !entry.ReadASN1(&number, casn1.INTEGER) || len(number) == 0 {
		return false
	}
	if number[0] == 0 {
		number = number[1:] // of what would otherwise be a negative number
	}
	if !wanted[string(number)] {
		return isTime(entry)
	}
	if !readTime(&entry, &at) {
		return false
	}
	off, ok := takenOff(&entry)
	if ok && !off {
		l.has[string(number)] = true
	}
	return ok
}

// removed is the reason by which a list takes a certificate off an earlier one (RFC 5280, 5.3.1).
const removed = 8

var reasonCode = asn1.ObjectIdentifier{2, 5, 29, 21}

// takenOff reads an entry's extensions.
func takenOff(entry *cryptobyte.String) (off, ok bool) {
	var extensions cryptobyte.String
	var some bool
	if !entry.ReadOptionalASN1(&extensions, &some, casn1.SEQUENCE) || !entry.Empty() {
		return false, false
	}
	for !extensions.Empty() {
		var extension, value cryptobyte.String
		var id asn1.ObjectIdentifier
		if !extensions.ReadASN1(&extension, casn1.SEQUENCE) || !extension.ReadASN1ObjectIdentifier(&id) ||
			!extension.SkipOptionalASN1(casn1.BOOLEAN) || !extension.ReadASN1(&value, casn1.OCTET_STRING) || !extension.Empty() {
			return false, false
		}
		if !id.Equal(reasonCode) {
			continue
		}
		var reason int
		if !value.ReadASN1Enum(&reason) || !value.Empty() {
			return false, false
		}
		off = off || reason == removed
	}
	return off, true
}

func isTime(s cryptobyte.String) bool {
	return s.PeekASN1Tag(casn1.UTCTime) || s.PeekASN1Tag(casn1.GeneralizedTime)
}

func readTime(s *cryptobyte.String, t *time.Time) bool {
	ok := false
	if s.PeekASN1Tag(casn1.UTCTime) {
		ok = s.ReadASN1UTCTime(t)
	} else {
		ok = s.ReadASN1GeneralizedTime(t)
	}
	*t = t.UTC()
	return ok
}

// serialBytes is a serial number as a list has it, of one as Vault writes it.
func serialBytes(ref string) string {
	raw, err := hex.DecodeString(strings.ReplaceAll(ref, ":", ""))
	if err != nil {
		return ref // of no list
	}
	return string(raw)
}
