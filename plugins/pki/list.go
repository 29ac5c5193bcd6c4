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

// maxList is the size limit of a revocation list in bytes: room for 1.7 million certificates. A list is read into
// memory whole, so this also bounds the memory it takes. A longer list proves nothing: its certificates are dead only
// once they have expired.
const maxList = 64 << 20

// list holds the wanted entries of a revocation list, in the form in which relying parties fetch it.
type list struct {
	by      authority
	issuer  string // the authority's name
	made    time.Time
	next    time.Time // the next list is due by then
	partial bool      // it has a critical extension, so it is not the complete list of its authority
	has     map[string]bool
}

// inForce reports whether relying parties accept the list.
func (l list) inForce(now time.Time) bool {
	return !l.made.IsZero() && now.Before(l.next) && !l.partial
}

var errList = errors.New("the response from Vault is not a single, well-formed revocation list")

// parseList reads one list in DER with nothing after it (RFC 5280, 5.1). It keeps only the wanted serial numbers: a
// list holds every revoked certificate, and a proof needs a few of them.
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
	l.issuer, l.by.name = name.String(), digestName(issuer)
	var revoked bool
	if !tbs.ReadOptionalASN1(&entries, &revoked, casn1.SEQUENCE) || !l.extensions(&tbs) || !tbs.Empty() {
		return list{}, errList
	}
	for !entries.Empty() {
		if !l.entry(&entries, wanted) {
			return list{}, errList
		}
	}
	return l, nil
}

// entry reads one entry and reports whether it is well-formed.
func (l *list) entry(entries *cryptobyte.String, wanted map[string]bool) bool {
	var entry, number cryptobyte.String
	var at time.Time
	if !entries.ReadASN1(&entry, casn1.SEQUENCE) || !entry.ReadASN1(&number, casn1.INTEGER) || len(number) == 0 {
		return false
	}
	if number[0] == 0 {
		number = number[1:] // DER's padding of a positive number with the high bit set
	}
	if !wanted[string(number)] {
		return isTime(entry)
	}
	if !readTime(&entry, &at) {
		return false
	}
	removed, ok := isRemoval(&entry)
	if ok && !removed {
		l.has[string(number)] = true
	}
	return ok
}

var keyID = asn1.ObjectIdentifier{2, 5, 29, 35}

// extensions reads the list's extensions and reports whether they are well-formed. It takes the authority's key id from
// them. A delta list and a list for some certificates only have a critical extension (RFC 5280, 5.2.4 and 5.2.5).
func (l *list) extensions(tbs *cryptobyte.String) bool {
	var outer, all cryptobyte.String
	var some bool
	if !tbs.ReadOptionalASN1(&outer, &some, casn1.Tag(0).ContextSpecific().Constructed()) {
		return false
	}
	if some && (!outer.ReadASN1(&all, casn1.SEQUENCE) || !outer.Empty()) {
		return false
	}
	for !all.Empty() {
		id, critical, value, ok := readExtension(&all)
		if !ok {
			return false
		}
		l.partial = l.partial || critical
		if !id.Equal(keyID) {
			continue
		}
		var inner, key cryptobyte.String
		var has bool
		if !value.ReadASN1(&inner, casn1.SEQUENCE) || !value.Empty() ||
			!inner.ReadOptionalASN1(&key, &has, casn1.Tag(0).ContextSpecific()) {
			return false
		}
		l.by.key = hex.EncodeToString(key)
	}
	return true
}

// readExtension reads one extension (RFC 5280, 4.1).
func readExtension(all *cryptobyte.String) (id asn1.ObjectIdentifier, critical bool, value cryptobyte.String, ok bool) {
	var extension, flag cryptobyte.String
	ok = all.ReadASN1(&extension, casn1.SEQUENCE) && extension.ReadASN1ObjectIdentifier(&id) &&
		extension.ReadOptionalASN1(&flag, &critical, casn1.BOOLEAN) &&
		extension.ReadASN1(&value, casn1.OCTET_STRING) && extension.Empty()
	critical = critical && (len(flag) != 1 || flag[0] != 0)
	return id, critical, value, ok
}

// removeFromCRL is the reason code by which a list takes a certificate off an earlier list (RFC 5280, 5.3.1).
const removeFromCRL = 8

var reasonCode = asn1.ObjectIdentifier{2, 5, 29, 21}

// isRemoval reads an entry's extensions. It reports whether the entry does not revoke a certificate of the list's own
// authority: the reason is removeFromCRL, or a critical extension names another authority (RFC 5280, 5.3.3). It also
// reports whether the extensions are well-formed.
func isRemoval(entry *cryptobyte.String) (removed, ok bool) {
	var extensions cryptobyte.String
	var some bool
	if !entry.ReadOptionalASN1(&extensions, &some, casn1.SEQUENCE) || !entry.Empty() {
		return false, false
	}
	for !extensions.Empty() {
		id, critical, value, ok := readExtension(&extensions)
		if !ok {
			return false, false
		}
		if !id.Equal(reasonCode) {
			removed = removed || critical
			continue
		}
		var reason int
		if !value.ReadASN1Enum(&reason) || !value.Empty() {
			return false, false
		}
		removed = removed || reason == removeFromCRL
	}
	return removed, true
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

// serialBytes converts a serial number from Vault's notation to the bytes of a list entry.
func serialBytes(serial string) string {
	raw, err := hex.DecodeString(strings.ReplaceAll(serial, ":", ""))
	if err != nil {
		return serial // matches no entry
	}
	return string(raw)
}
