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
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
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

// String returns the spelling that parseTable reads.
func (t table) String() string { return spell(t[0]) + "." + spell(t[1]) }

// sql returns the table's name for SQL.
func (t table) sql() string { return pgx.Identifier(t[:]).Sanitize() }

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

// parseTables reads the tables of a step or a tool: "schema.table", or "table" in the given schema. See parseTable.
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

// parseTable reads schema.table, or a table in the given schema. A name is read as it is, upper case included. One with
// other characters than letters, digits, underscores, hyphens, dollar signs and inner blanks must be in double quotes,
// with a quote in it doubled. Other names must not be in quotes, so that policies can compare the text.
func parseTable(s, schema string) (table, error) {
	first, rest, err := parseIdentifier(s)
	t := table{schema, first}
	if err == nil && rest != "" && rest[0] == '.' {
		t[0] = first
		t[1], rest, err = parseIdentifier(rest[1:])
	}
	if err != nil || rest != "" {
		return table{}, errors.New("a table must be schema.table or table, each a name of at most 63 bytes, " +
			`in double quotes if and only if it has other characters than letters, digits, "_", "-", "$" and inner blanks`)
	}
	if err := checkSchema(t[0]); err != nil {
		return table{}, err
	}
	return t, nil
}

// checkSchema refuses a schema that is not available to agents.
func checkSchema(s string) error {
	if !isIdentifier(s) {
		return errors.New("must be the name of a schema, at most 63 bytes, without quotes")
	}
	if strings.HasPrefix(s, "pg_") || s == "information_schema" || s == "pawl" || strings.HasPrefix(s, "pawl_") {
		return fmt.Errorf("schema %s is not available to agents", s)
	}
	return nil
}

var errIdentifier = errors.New("not an identifier")

// parseIdentifier reads the identifier at the beginning of s and returns the rest.
func parseIdentifier(s string) (name, rest string, err error) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexAny(s, `."`)
		if end < 0 {
			end = len(s)
		}
		name, rest = s[:end], s[end:]
	} else {
		end := 1
		for ; end < len(s); end++ {
			if s[end] != '"' {
				continue
			}
			if end+1 == len(s) || s[end+1] != '"' {
				break
			}
			end++ // a doubled quote
		}
		if end >= len(s) {
			return "", "", errIdentifier
		}
		name, rest = strings.ReplaceAll(s[1:end], `""`, `"`), s[end+1:]
	}
	if !isIdentifier(name) || spell(name) != s[:len(s)-len(rest)] {
		return "", "", errIdentifier
	}
	return name, rest, nil
}

// spell returns the one spelling of an identifier that parseIdentifier reads.
func spell(name string) string {
	plain := strings.Trim(name, " ") == name && !strings.ContainsFunc(name, func(c rune) bool {
		return !unicode.In(c, unicode.L, unicode.M, unicode.N) && !strings.ContainsRune("_-$ ", c)
	})
	if plain {
		return name
	}
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
}

// isIdentifier accepts every name that PostgreSQL accepts in quotes.
func isIdentifier(s string) bool {
	return s != "" && len(s) <= maxName && utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// splitTables splits a comma-separated list. A comma in double quotes does not separate.
func splitTables(list string) (names []string) {
	quoted, start := false, 0
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '"':
			quoted = !quoted
		case list[i] == ',' && !quoted:
			names, start = append(names, list[start:i]), i+1
		}
	}
	return append(names, list[start:])
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
	if !isIdentifier(column) {
		return nil, errors.New("the column must be a name of at most 63 bytes, without quotes")
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
