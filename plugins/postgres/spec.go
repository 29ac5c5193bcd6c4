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

// spec is a shape in full. Its members are in alphabetical order and its lists are sorted, so that
// its JSON is canonical.
type spec struct {
	Connections int      `json:"connections"`
	Database    string   `json:"database"`
	Filter      *filter  `json:"filter,omitempty"`
	IdleMS      int64    `json:"idle_ms"`
	Network     string   `json:"network,omitempty"` // members of pawl_net_… are confined in pg_hba.conf
	StatementMS int64    `json:"statement_ms"`
	Tables      []table  `json:"tables"`
	Verbs       []string `json:"verbs"`
}

// filter keeps the rows where the column equals the value.
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

// encode gives the specification's JSON, and the shape's name: the first 12 hexadecimal digits of
// its SHA-256. The database keeps both and refuses a name that belongs to another specification, so
// what the short hash must bear is accidents only.
func (s spec) encode() (shape, text string) {
	b, err := json.Marshal(s)
	if err != nil {
		panic("a specification of strings and integers did not encode: " + err.Error())
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])[:12], string(b)
}

// parseTables reads the tables of a step or a tool: "schema.table", or "table" in the given schema.
func parseTables(names []string, schema string) ([]table, error) {
	if len(names) == 0 || len(names) > maxTables {
		return nil, fmt.Errorf("between 1 and %d tables", maxTables)
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
		return table{}, errors.New("a table is schema.table or table, each a letter or underscore and then letters, digits and underscores, at most 63")
	}
	if strings.HasPrefix(t[0], "pg_") || t[0] == "information_schema" || t[0] == "pawl" || strings.HasPrefix(t[0], "pawl_") {
		return table{}, fmt.Errorf("schema %s is not for agents", t[0])
	}
	return t, nil
}

// isName accepts plain identifiers. They are quoted wherever they go, so upper and lower case are
// different names, as PostgreSQL stores them.
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
			return nil, errors.New("verbs are select, insert, update and delete, in lower case")
		}
	}
	if len(verbs) == 0 {
		return nil, errors.New("no verb")
	}
	sorted := slices.Clone(verbs)
	slices.Sort(sorted)
	return slices.Compact(sorted), nil
}

// parseFilter checks a row filter. The value is compared as the column's type reads it.
func parseFilter(column, value string) (*filter, error) {
	if !isName(column) {
		return nil, errors.New("the column is not a plain name")
	}
	if len(value) > maxFilter || strings.ContainsRune(value, 0) {
		return nil, fmt.Errorf("the value is longer than %d bytes or has a zero byte", maxFilter)
	}
	return &filter{column, value}, nil
}

// subset reports whether all of some are among all.
func subset[T comparable](some, all []T) bool {
	return !slices.ContainsFunc(some, func(v T) bool { return !slices.Contains(all, v) })
}
