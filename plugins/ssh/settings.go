package ssh

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/args"
)

// source is the origin of a value: an argument or, if arg is empty, a fixed value.
type source struct{ arg, fixed string }

// settings hold the sources of a certificate's principal, force_command and source_address, and its extensions.
type settings struct {
	fields     map[string]source
	extensions map[string]string
	outlives   time.Duration // sessions have ended this long after the certificate's end
}

// checks holds the fields, each with the check that its value must pass.
var checks = map[string]func(string) error{"principal": checkPrincipal, "force_command": checkCommand, "source_address": checkAddresses}

// extensions are the certificate extensions that a tool may grant. None of them permits forwarding.
var extensions = []string{"permit-pty", "permit-user-rc", "no-touch-required"}

var principal = regexp.MustCompile(`^[a-z_][a-z0-9_.-]{0,63}$`)

// Load implements [broker.Backend]. The tool's Path is a mount and a role. Settings:
//
//	principal        the one user name to log in as, or another principal that the host accepts, such as
//	                 deploy@example.org, DOMAIN\svc or Role:prod; required. From an argument: a user name alone
//	force_command    the command that sshd runs instead of the requested one; required for the label native
//	source_address   addresses and networks to log in from, joined by commas
//	arg.<argument>   instead of a fixed value: the field above that the argument fills as a whole
//	extensions       permit-pty, permit-user-rc, no-touch-required, joined by commas; default none.
//	                 Forwarding is never granted
//	outlives         the time, of at most 24h, after which the hosts have ended every session and process that was started
//	                 with an expired certificate; until then it is not dead. Default: sessions are not counted
//
// A fixed command takes no values from arguments: nothing is spliced into text that a shell reads.
func (b *Backend) Load(t broker.Tool) error {
	_, err := load(t)
	return err
}

func load(t broker.Tool) (settings, error) {
	s := settings{fields: map[string]source{}, extensions: map[string]string{}}
	if len(t.Path.Segments()) != 2 {
		return s, fmt.Errorf("tool %q: the path must be a mount and a role", t.Name)
	}
	for _, key := range slices.Sorted(maps.Keys(t.Settings)) {
		if err := s.set(t, key, t.Settings[key]); err != nil {
			return s, fmt.Errorf("tool %q: setting %q: %w", t.Name, key, err)
		}
	}
	var err error
	if s.outlives, err = t.Outlives(); err != nil {
		return s, fmt.Errorf("tool %q: setting \"outlives\": %w", t.Name, err)
	}
	for name := range t.Arguments {
		if t.Settings["arg."+name] == "" {
			return s, fmt.Errorf("tool %q: argument %q fills no field: set arg.%s", t.Name, name, name)
		}
	}
	if _, ok := s.fields["principal"]; !ok {
		return s, fmt.Errorf("tool %q: a principal is required", t.Name)
	}
	if _, ok := s.fields["force_command"]; !ok && t.Narrowing == broker.NarrowNative {
		return s, fmt.Errorf("tool %q: the label native requires force_command: "+
			"without it the certificate opens a shell", t.Name)
	}
	return s, nil
}

func (s *settings) set(t broker.Tool, key, value string) error {
	if key == "outlives" {
		return nil // load reads it
	}
	if key == "extensions" {
		for e := range strings.SplitSeq(value, ",") {
			if !slices.Contains(extensions, e) {
				return fmt.Errorf("extension %.40q cannot be granted", e)
			}
			s.extensions[e] = ""
		}
		return nil
	}
	field, src := key, source{fixed: value}
	name, isArg := strings.CutPrefix(key, "arg.")
	if isArg {
		field, src = value, source{arg: name}
		if p, ok := t.Arguments[name]; !ok || !p.Required || p.Kind != "string" {
			return fmt.Errorf("the tool has no required argument %q that is a string", name)
		}
	}
	check, known := checks[field]
	if !known {
		return errors.New("unknown setting or field")
	}
	if _, twice := s.fields[field]; twice {
		return errors.New("the field has two sources")
	}
	s.fields[field] = src
	if isArg {
		return nil
	}
	if strings.Contains(value, "{{") || strings.Contains(value, "${arg") {
		return errors.New("a value must be fixed or an argument, never a template")
	}
	if field == "principal" {
		return checkFixedPrincipal(value)
	}
	return check(value)
}

// spec returns the certificate to request for the arguments.
func (s settings) spec(args args.Args) (want spec, err error) {
	want.options, want.extensions = map[string]string{}, s.extensions
	for field, src := range s.fields {
		value := src.fixed
		if src.arg != "" {
			v, _ := args.Get(src.arg)
			value, _ = v.Text()
			if err := checks[field](value); err != nil {
				return want, fmt.Errorf("argument %q: %w", src.arg, err)
			}
		}
		if field == "principal" {
			want.principal = value
			continue
		}
		want.options[strings.ReplaceAll(field, "_", "-")] = value
	}
	return want, nil
}

// checkFixedPrincipal accepts the principals of directories too, such as deploy@example.org, DOMAIN\svc and Role:prod.
// The tool's author has written it. It rejects lists, which Vault splits at commas, text that Vault trims or that a
// terminal does not show, and what its author may take for a pattern.
func checkFixedPrincipal(s string) error {
	bad := func(r rune) bool { return !unicode.IsPrint(r) || strings.ContainsRune(",*?\uFFFD", r) }
	if s == "" || len(s) > 255 || strings.TrimSpace(s) != s || strings.ContainsFunc(s, bad) {
		return errors.New("is not one principal: up to 255 bytes of printable text without commas, stars, question marks, " +
			"and blanks at its ends")
	}
	return nil
}

// checkPrincipal accepts the user names of a host alone from an argument, which an agent chooses.
func checkPrincipal(s string) error {
	if !principal.MatchString(s) {
		return errors.New("is not a user name of a host: another principal must be fixed in the tool")
	}
	return nil
}

func checkCommand(s string) error {
	if s == "" || len(s) > 4096 {
		return errors.New("must have between 1 and 4,096 bytes")
	}
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] == 0x7f {
			return errors.New("contains a control character")
		}
	}
	return nil
}

func checkAddresses(s string) error {
	for a := range strings.SplitSeq(s, ",") {
		if ip, err := netip.ParseAddr(a); err == nil && ip.Zone() == "" {
			continue
		}
		if p, err := netip.ParsePrefix(a); err != nil || p != p.Masked() || p.Bits() == 0 {
			return errors.New("is not a list of addresses and networks, or allows every address")
		}
	}
	return nil
}
