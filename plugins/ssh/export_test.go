package ssh

import "time"

// EncodeKRL encodes a revocation list with these key ids of ours.
func EncodeKRL(ids []string, version uint64, at time.Time) []byte {
	return krl{version: version, ids: ids}.encode(at)
}

// DecodeKRL returns our key ids and the version of a revocation list.
func DecodeKRL(raw []byte) (ids []string, version uint64, err error) {
	k, err := decodeKRL(raw)
	return k.ids, k.version, err
}

// Recode decodes a revocation list and encodes it again, with the sections of other programs.
func Recode(raw []byte) ([]byte, error) {
	k, err := decodeKRL(raw)
	if err != nil {
		return nil, err
	}
	return k.encode(time.Unix(0, 0)), nil
}
