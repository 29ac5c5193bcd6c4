package postgres

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// spec is the full specification of a shape. Its members are in alphabetical order and its lists are sorted, so that
// its JSON is canonical.
type spec struct {
	Connections int      `json:"connections"`
	Database    string   `json:"database"`
	Filter      *filter  `json:"filter,omitempty"`
	IdleMS      int64    `json:"idle_ms"`
	Network     string   `json:"network,omitempty"` // pg_hba.conf confines the members of pawl_net_NETWORK
	StatementMS int64    `json:"statement_ms"`
	Tables      []table  `json:"tables"`
	Verbs       []string `json:"verbs"`
}

// filter selects the rows where the column equals the value.
type filter struct {
	Column string `json:"column"`
	Value  string `json:"value"`
}

// table is a schema and a name.
type table [2]string

func (t table) String() string { return t[0] + "." + t[1] }

const (
	maxTables = 32
	maxName   = 63 // PostgreSQL's own limit, in bytes
	maxFilter = 1024
)

// encode returns the specification's JSON and the shape's name, the first 12 hexadecimal digits of its SHA-256. The
// database keeps both and refuses a name that belongs to another specification. So the short hash need only avoid
// accidental collisions.
func (s spec) encode() (shape, text string) {
	b, err := json.Marshal(s)
	if err != nil {
		panic("postgres: a specification of strings and integers did not encode: " + err.Error())
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])[:12], string(b)
}

// parseTables reads the tables of a step or a tool: "schema.table", or "table" in the given schema.
func parseTables(names []string, schema string) ([]table, error) {
	if len(names) == 0 || len(names) > maxTables {
		return nil, fmt.Errorf("must be between 1 and %d tables", maxTables)
	}
	tables := make([]table, 0, len(names))
	for _, name := range names {
		t, err := parseTable(name, schema)
		if err != nil {
			return nil, err
		}
		tables = append(tables, t)
	}
	slices.SortFunc(tables, func(a, b table) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) })
	return slices.Compact(tables), nil
}

func parseTable(s, schema string) (table, error) {
	t := table{schema, s}
	if before, after, dotted := strings.Cut(s, "."); dotted {
		t = table{before, after}
	}
	if !isName(t[0]) || !isName(t[1]) {
		return table{}, errors.New("a table must be schema.table or table, " +
			"each of at most 63 letters, digits and underscores and not beginning with a digit")
	}
	if strings.HasPrefix(t[0], "pg_") || t[0] == "information_schema" ||
		t[0] == "pawl" || strings.HasPrefix(t[0], "pawl_") {
		return table{}, fmt.Errorf("schema %s is not available to agents", t[0])
	}
	return t, nil
}

// isName accepts plain identifiers. SQL always quotes them, so upper and lower case are different names, as PostgreSQL
// stores them.
func isName(s string) bool {
	if s == "" || len(s) > maxName || s[0] >= '0' && s[0] <= '9' {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_') {
			return false
		}
	}
	return true
}

var allVerbs = [...]string{"delete", "insert", "select", "update"}

// parseVerbs accepts a set of lower-case verbs, in any order.
func parseVerbs(verbs []string) ([]string, error) {
	for _, v := range verbs {
		if !slices.Contains(allVerbs[:], v) {
			return nil, errors.New("verbs must be of select, insert, update and delete, in lower case")
		}
	}
	if len(verbs) == 0 {
		return nil, errors.New("must be at least one verb")
	}
	sorted := slices.Clone(verbs)
	slices.Sort(sorted)
	return slices.Compact(sorted), nil
}

// parseFilter checks a row filter. The database parses the value as the column's type.
func parseFilter(column, value string) (*filter, error) {
	if !isName(column) {
		return nil, errors.New("the column must be a plain name")
	}
	if len(value) > maxFilter || strings.ContainsRune(value, 0) {
		return nil, fmt.Errorf("the value must have at most %d bytes and no zero byte", maxFilter)
	}
	return &filter{column, value}, nil
}

// subset reports whether all contains every element of some.
func subset[T comparable](some, all []T) bool {
	return !slices.ContainsFunc(some, func(v T) bool { return !slices.Contains(all, v) })
}
