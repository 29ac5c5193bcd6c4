package postgres

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

// Arguments that a tool of this backend may declare.
const (
	argTables       = "tables"        // list: "schema.table", or "table" in the setting "schema"; see parseTable
	argVerbs        = "verbs"         // list of select, insert, update, delete
	argFilterColumn = "filter_column" // string: the column that must equal filter_value
	argFilterValue  = "filter_value"  // string
)

var argKinds = map[string]string{
	argTables: "list", argVerbs: "list", argFilterColumn: "string", argFilterValue: "string",
}

// settings holds a tool's parsed settings.
type settings struct {
	host         string // for the agent to connect to
	port         int
	own          string   // host:port that the tool names itself; empty: the DSN's
	follow       *servers // if set, these instead of host and port
	sslmode      string
	schema       string        // of a table that is named without one
	tables       []table       // the tables that a step may ask for; empty: every table that pawl_maker may grant
	verbs        []string      // the verbs that a step may ask for
	filterColumn string        // if set, every step is filtered by this column
	network      string        // the only origin of logins, enforced by pg_hba.conf; empty: no restriction by the tool
	connections  int           // at a time, per credential
	statement    time.Duration // statement_timeout
	idle         time.Duration // idle_in_transaction_session_timeout
}

var sslmodes = []string{"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}

// Load implements [broker.Backend]. A tool's Path is the mount and the role in Vault, and its label must be native. It
// must declare the argument "tables", unless the setting "tables" fixes them. It may declare "verbs", "filter_value"
// and "filter_column". All settings are optional:
//
//   - host, port, sslmode: where and how the agent connects. Default: those of the backend's DSN, and verify-full. If
//     the DSN names several servers, host and port are those of the primary, and the secret's URL names all. Another host
//     must be the server of the DSN or one of Config.Standbys. The database need not be up when a tool is loaded, so that
//     is checked before each mint.
//   - dbname: if set, must be the backend's database.
//   - schema: of tables named without one. Default: public.
//   - tables, verbs: comma-separated. A step may ask for these at most, and gets all of them if it does not ask.
//     Default: every table that pawl_maker may grant, and select. A name of a schema or table with other characters
//     than letters, digits, "_", "-", "$" and inner blanks is in double quotes, here and in the argument "tables".
//   - filter_column: every step must pass filter_value, and sees only the rows where the column equals it.
//   - network: a lower-case name. Logins are members of pawl_net_NAME, which pg_hba.conf confines to the addresses that
//     the platform team writes there (bootstrap.sql shows the lines). Without these lines every mint is refused.
//   - connections: at a time per credential, 1 to 100. Default: 4.
//   - statement_timeout, idle_timeout: such as 30s, at most 24h. Default: 30s and 10s. The agent can change them: they
//     protect the database from accidents and are no security boundary.
func (b *Backend) Load(t broker.Tool) error {
	s, err := b.parseTool(t)
	if err == nil {
		b.hosts.remember(t.Name, s.own)
	}
	return err
}

// mintPath is the path at which Vault makes a login: creds is the engine's, below its mount.
func mintPath(t broker.Tool) broker.VaultPath { return t.Path.Insert(1, "creds") }

func (b *Backend) parseTool(t broker.Tool) (settings, error) {
	if t.Narrowing != broker.NarrowNative {
		return settings{}, fmt.Errorf("tool %s: narrowing must be native: PostgreSQL refuses wider access", t.Name)
	}
	if len(t.Path.Segments()) != 2 {
		return settings{}, fmt.Errorf("tool %s: the path must be the mount and the role", t.Name)
	}
	s := settings{
		sslmode: "verify-full",
		schema:  "public", verbs: []string{"select"},
		connections: 4, statement: 30 * time.Second, idle: 10 * time.Second,
	}
	named := b.servers.inOrder()
	s.host, s.port = named[0].host, int(named[0].port)
	if t.Settings["host"] == "" && t.Settings["port"] == "" && !b.servers.onSocket() {
		s.follow = b.servers
	}
	for _, name := range slices.Sorted(maps.Keys(t.Settings)) {
		if name == "tables" {
			continue // parsed last: it depends on schema
		}
		if err := b.parseSetting(&s, name, t.Settings[name]); err != nil {
			return settings{}, fmt.Errorf("tool %s: setting %q: %w", t.Name, name, err)
		}
	}
	if name := net.JoinHostPort(s.host, strconv.Itoa(s.port)); s.follow == nil &&
		(name != nameOf(b.address) || len(b.servers.named) > 1) {
		s.own = name
	}
	if list, given := t.Settings["tables"]; given {
		var err error
		if s.tables, err = parseTables(splitTables(list), s.schema); err != nil {
			return settings{}, fmt.Errorf("tool %s: setting \"tables\": %w", t.Name, err)
		}
	}
	if err := s.checkArguments(t.Arguments); err != nil {
		return settings{}, fmt.Errorf("tool %s: %w", t.Name, err)
	}
	return s, nil
}

func (b *Backend) parseSetting(s *settings, name, value string) (err error) {
	switch name {
	case "host":
		if s.host = value; !isHost(value) {
			err = errors.New("must be a host name or an address")
		}
	case "port":
		s.port, err = parseNumber(value, 65535)
	case "dbname":
		if value != b.database {
			err = fmt.Errorf("must be the backend's database %q", b.database)
		}
	case "sslmode":
		if s.sslmode = value; !slices.Contains(sslmodes, value) {
			err = fmt.Errorf("must be one of %s", strings.Join(sslmodes, ", "))
		}
	case "schema":
		s.schema = value
		err = checkSchema(value)
	case "verbs":
		s.verbs, err = parseVerbs(strings.Split(value, ","))
	case "filter_column":
		s.filterColumn = value
		_, err = parseFilter(value, "")
	case "network":
		if s.network = value; !isNetwork(value) {
			err = errors.New("must be at most 32 lower-case letters, digits and underscores, beginning with a letter")
		}
	case "connections":
		s.connections, err = parseNumber(value, 100)
	case "statement_timeout":
		s.statement, err = parseDuration(value)
	case "idle_timeout":
		s.idle, err = parseDuration(value)
	default:
		err = errors.New("unknown setting")
	}
	return err
}

// checkArguments refuses arguments that would have no effect, and tools where a step could omit the filter by accident.
func (s settings) checkArguments(declared map[string]broker.Parameter) error {
	for _, name := range slices.Sorted(maps.Keys(declared)) {
		kind, known := argKinds[name]
		if !known {
			return fmt.Errorf("argument %q would have no effect in the database", name)
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
		return errors.New("an argument or a setting \"tables\" is required")
	case s.filterColumn != "" && column:
		return errors.New("the setting filter_column and the argument filter_column are mutually exclusive")
	case value != (column || s.filterColumn != ""):
		return errors.New("a filter needs a column and the argument filter_value")
	case s.filterColumn != "" && !declared[argFilterValue].Required:
		return errors.New("with the setting filter_column, the argument filter_value must be required")
	}
	return nil
}

// isHost accepts a host that needs no quoting in a URL or a connection string. It is a name, an address, or the
// directory of a Unix socket.
func isHost(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && strings.IndexByte(".-_:/", c) < 0 {
			return false
		}
	}
	return s != "" && len(s) <= 255
}

// isNetwork accepts a valid suffix of a role named pawl_net_NETWORK.
func isNetwork(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || i > 0 && (c >= '0' && c <= '9' || c == '_')) {
			return false
		}
	}
	return s != "" && len(s) <= 32
}

func parseNumber(s string, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("must be a number between 1 and %d", most)
	}
	return n, nil
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Millisecond || d > 24*time.Hour {
		return 0, errors.New("must be a duration between 1ms and 24h")
	}
	return d, nil
}
