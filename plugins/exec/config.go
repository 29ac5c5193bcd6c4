package exec

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker"
)

var (
	nameForm     = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)
	checksumForm = regexp.MustCompile(`^[0-9a-f]{64}$`)
	envForm      = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=[^\x00]*$`)
	memberForm   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,63}$`)
)

func (cfg *Config) complete() error {
	if !nameForm.MatchString(cfg.Name) {
		return errors.New("Name is required: lower-case letters, digits and hyphens, at most 32")
	}
	if err := cfg.Program.check(); err != nil {
		return fmt.Errorf("Program: %w", err)
	}
	if cfg.Probe != nil {
		if err := cfg.Probe.check(); err != nil {
			return fmt.Errorf("Probe: %w", err)
		}
	}
	if cfg.Timeout < 0 || cfg.MaxOutput < 0 || cfg.Processes < 0 {
		return errors.New("Timeout, MaxOutput and Processes must not be negative")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.MaxOutput == 0 {
		cfg.MaxOutput = 1 << 20
	}
	if cfg.Processes == 0 {
		cfg.Processes = 8
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return nil
}

func (p Program) check() error {
	switch {
	case !filepath.IsAbs(p.Path):
		return errors.New("Path is required and must be absolute: no search path may select the program")
	case !checksumForm.MatchString(p.SHA256):
		return errors.New("SHA256 is required: 64 lower-case hexadecimal digits")
	case p.Dir != "" && !filepath.IsAbs(p.Dir):
		return errors.New("Dir must be absolute")
	}
	for _, e := range p.Env {
		if !envForm.MatchString(e) {
			return errors.New(`Env has an element that is not "NAME=value"`) // not shown: it may be a secret
		}
	}
	for _, a := range p.Args {
		if strings.ContainsRune(a, 0) {
			return errors.New("Args contains a zero byte")
		}
	}
	return nil
}

// load checks the tool's path and the settings that belong to the broker. It returns the setting pawl.ref.
func load(t broker.Tool) (ref string, err error) {
	if t.Path.IsZero() {
		return "", errors.New("a vault path is required")
	}
	for key, value := range t.Settings {
		ok := true
		switch key {
		case "pawl.mint":
			ok = value == "read" || value == "write"
		case "pawl.lease":
			ok = value == "required" || value == "none"
		case "pawl.ref":
			ok = memberForm.MatchString(value)
		default:
			ok = !strings.HasPrefix(key, "pawl.")
		}
		if !ok {
			return "", fmt.Errorf("setting %.40q: unknown setting or value", key)
		}
	}
	return t.Settings["pawl.ref"], nil
}
