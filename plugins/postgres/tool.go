package postgres

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// The arguments that a tool of this backend may declare.
const (
	argTables       = "tables"        // list: "schema.table", or "table" in the setting "schema"
	argVerbs        = "verbs"         // list of select, insert, update, delete
	argFilterColumn = "filter_column" // string: only rows where this column equals filter_value
	argFilterValue  = "filter_value"  // string
)

var argKinds = map[string]string{argTables: "list", argVerbs: "list", argFilterColumn: "string", argFilterValue: "string"}

// settings are a tool's settings, read.
type settings struct {
	mount, role  string
	host         string // where the agent connects to
	port         int
	sslmode      string
	schema       string        // of tables without one
	tables       []table       // the most that may be asked for; empty: whatever pawl_maker may grant
	verbs        []string      // the most that may be asked for
	filterColumn string        // every step is filtered by this column
	network      string        // from where alone logins come in, by pg_hba.conf; empty: from wherever that lets everybody in
	connections  int           // of one credential at a time
	statement    time.Duration // statement_timeout
	idle         time.Duration // idle_in_transaction_session_timeout
}

var sslmodes = []string{"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}

// Load checks a tool. Its Path is the mount and the role in Vault; its label must be native; of the
// arguments it declares at least "tables", unless the setting "tables" fixes them, and otherwise
// "verbs", "filter_value" and "filter_column". The settings, each of which may be left out:
//
//   - host, port, sslmode: what the agent is told to connect to; the backend's own, and verify-full
//   - dbname: if given, must be the backend's database
//   - schema: of tables named without one; public
//   - tables, verbs: comma-separated, the most that a step may ask for, and what it gets when it does
//     not ask; any table that pawl_maker may grant, and select
//   - filter_column: every step must give filter_value, and sees only the rows where the column equals it
//   - network: a lower-case name; logins are members of pawl_net_NAME, which pg_hba.conf confines to the
//     addresses that the platform wrote there (bootstrap.sql has the lines); refused while it does not
//   - connections: at a time under one credential, 1 to 100; 4
//   - statement_timeout, idle_timeout: as 30s, at most 24h; 30s and 10s. The agent can change them: they
//     spare the database and are no boundary
func (b *Backend) Load(t broker.Tool) error {
	_, err := b.read(t)
	return err
}

func (b *Backend) read(t broker.Tool) (settings, error) {
	if t.Narrowing != broker.NarrowNative {
		return settings{}, fmt.Errorf("tool %s: narrowing here is native: PostgreSQL itself refuses more", t.Name)
	}
	if len(t.Path) != 2 || !isSegment(t.Path[0]) || !isSegment(t.Path[1]) {
		return settings{}, fmt.Errorf("tool %s: the path is the mount and the role", t.Name)
	}
	s := settings{
		mount: t.Path[0], role: t.Path[1],
		host: b.address.ConnConfig.Host, port: int(b.address.ConnConfig.Port), sslmode: "verify-full",
		schema: "public", verbs: []string{"select"}, connections: 4, statement: 30 * time.Second, idle: 10 * time.Second,
	}
	for _, name := range slices.Sorted(maps.Keys(t.Settings)) {
		if name == "tables" {
			continue // read last: it depends on schema
		}
		if err := b.set(&s, name, t.Settings[name]); err != nil {
			return settings{}, fmt.Errorf("tool %s: setting %q: %w", t.Name, name, err)
		}
	}
	if list, given := t.Settings["tables"]; given {
		var err error
		if s.tables, err = parseTables(strings.Split(list, ","), s.schema); err != nil {
			return settings{}, fmt.Errorf("tool %s: setting \"tables\": %w", t.Name, err)
		}
	}
	if err := s.checkArguments(t.Arguments); err != nil {
		return settings{}, fmt.Errorf("tool %s: %w", t.Name, err)
	}
	return s, nil
}

func (b *Backend) set(s *settings, name, value string) (err error) {
	switch name {
	case "host":
		if s.host = value; !isHost(value) {
			err = errors.New("not a host name or address")
		}
	case "port":
		s.port, err = number(value, 65535)
	case "dbname":
		if value != b.database {
			err = fmt.Errorf("this backend is for database %q", b.database)
		}
	case "sslmode":
		if s.sslmode = value; !slices.Contains(sslmodes, value) {
			err = errors.New("unknown")
		}
	case "schema":
		s.schema = value
		_, err = parseTable("t", value)
	case "verbs":
		s.verbs, err = parseVerbs(strings.Split(value, ","))
	case "filter_column":
		s.filterColumn = value
		_, err = parseFilter(value, "")
	case "network":
		if s.network = value; !isNetwork(value) {
			err = errors.New("not a lower-case letter and then lower-case letters, digits and underscores, at most 32")
		}
	case "connections":
		s.connections, err = number(value, 100)
	case "statement_timeout":
		s.statement, err = duration(value)
	case "idle_timeout":
		s.idle, err = duration(value)
	default:
		err = errors.New("unknown")
	}
	return err
}

// checkArguments refuses arguments that would be ignored, and tools whose filter could be left out
// by accident.
func (s settings) checkArguments(declared map[string]broker.Parameter) error {
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		kind, known := argKinds[name]
		if !known {
			return fmt.Errorf("argument %q has no way to the database", name)
		}
		if declared[name].Kind != kind {
			return fmt.Errorf("argument %q must be of kind %s", name, kind)
		}
	}
	_, tables := declared[argTables]
	_, value := declared[argFilterValue]
	_, column := declared[argFilterColumn]
	switch {
	case !tables && len(s.tables) == 0:
		return errors.New("neither an argument nor a setting names tables")
	case s.filterColumn != "" && column:
		return errors.New("the setting filter_column and the argument of that name exclude each other")
	case value != (column || s.filterColumn != ""):
		return errors.New("a filter needs a column and the argument filter_value")
	case s.filterColumn != "" && !declared[argFilterValue].Required:
		return errors.New("with the setting filter_column, the argument filter_value must be required")
	}
	return nil
}

// isHost accepts what can stand in a URL's host and in a connection string without quoting: a name, an
// address, or the directory of a Unix socket.
func isHost(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(".-_:/", c) >= 0) {
			return false
		}
	}
	return s != "" && len(s) <= 255
}

// isNetwork accepts what may follow pawl_net_ in a role's name.
func isNetwork(s string) bool {
	return isName(s) && len(s) <= 32 && s[0] != '_' && s == strings.ToLower(s)
}

// isSegment accepts one segment of a Vault path that has only one spelling.
func isSegment(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '-' && c != '_') {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

func number(s string, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("not a number between 1 and %d", most)
	}
	return n, nil
}

func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Millisecond || d > 24*time.Hour {
		return 0, errors.New("not a duration between 1ms and 24h")
	}
	return d, nil
}
