package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/pawlsec/pawl/plugins/ssh"
)

// sshHost checks the sshd of the machine on which it runs: whether it keeps the promises of plugin ssh. It asks
// sshd itself (sshd -T), which reads all files and Match blocks of the configuration.
type sshHost struct {
	sshd    string   // path of the program
	config  string   // file of its configuration; empty: sshd's own
	users   []string // the principals of the tools
	address string   // from which they log in
}

// settings are sshd's settings for one user, by their names in lower case.
type settings map[string]string

// ask returns sshd's settings for a user.
func (h sshHost) ask(ctx context.Context, user string) (settings, error) {
	args := []string{"-T", "-C", "user=" + user + ",host=" + h.address + ",addr=" + h.address}
	if h.config != "" {
		args = append(args, "-f", h.config)
	}
	cmd := exec.CommandContext(ctx, h.sshd, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s -T: %w: %s", h.sshd, err, strings.TrimSpace(errs.String()))
	}
	all := settings{}
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if _, twice := all[name]; !twice {
			all[name] = value
		}
	}
	return all, nil
}

// set returns a setting's value, or nothing if it is none.
func (s settings) set(name string) string {
	if s[name] == "none" {
		return ""
	}
	return s[name]
}

// user checks that a certificate for the user runs its own command, and is checked against a list.
func (h sshHost) user(ctx context.Context, user string) (found string, err error) {
	s, err := h.ask(ctx, user)
	if err != nil {
		return "", err
	}
	var faults []error
	if command := s.set("forcecommand"); command != "" {
		faults = append(faults, fmt.Errorf("ForceCommand %q runs instead of the certificate's command", command))
	}
	if s.set("trustedusercakeys") == "" {
		faults = append(faults, errors.New("TrustedUserCAKeys is not set, so no certificate logs in"))
	}
	if s.set("revokedkeys") == "" {
		faults = append(faults, errors.New("RevokedKeys is not set, so a revoked certificate logs in until it expires"))
	}
	found = "the certificate's command runs"
	for _, name := range []string{"authorizedprincipalsfile", "authorizedprincipalscommand"} {
		if value := s.set(name); value != "" {
			found += "; " + name + " " + value + " decides which principals log in as this user"
		}
	}
	return found, errors.Join(faults...)
}

// list checks the file that sshd reads as its list of revoked keys.
func (h sshHost) list(ctx context.Context) (found string, err error) {
	s, err := h.ask(ctx, h.users[0])
	if err != nil {
		return "", err
	}
	path := s.set("revokedkeys")
	if path == "" {
		return "", errors.New("RevokedKeys is not set")
	}
	files, err := revokedKeysOf(cmp.Or(h.config, "/etc/ssh/sshd_config"), 0)
	if err != nil {
		return "", err
	}
	for _, file := range files {
		if file != path {
			return "", fmt.Errorf("RevokedKeys also names %s: a Match block gives some clients another list than the broker's "+
				"queries show", file)
		}
	}
	version, ours, err := ssh.Inspect(path)
	switch {
	case err != nil:
		return "", fmt.Errorf("%s: %w", path, err)
	case version == 0:
		return "", fmt.Errorf("%s is empty: sshd takes it for a list that revokes nothing", path)
	}
	return fmt.Sprintf("%s, version %d, lists %d certificates of Pawl", path, version, ours), nil
}

// maxIncludes is the depth to which sshd follows Include.
const maxIncludes = 16

// revokedKeysOf returns the values of RevokedKeys in a configuration, in all Match blocks and included files. sshd -T
// gives only the one for a single client.
func revokedKeysOf(path string, depth int) (values []string, err error) {
	raw, err := os.ReadFile(path)
	if err != nil || depth > maxIncludes {
		return nil, err
	}
	for line := range strings.Lines(string(raw)) {
		words := strings.FieldsFunc(line, func(r rune) bool { return unicode.IsSpace(r) || r == '=' || r == '"' })
		if len(words) < 2 {
			continue
		}
		switch strings.ToLower(words[0]) {
		case "revokedkeys":
			values = append(values, words[1])
		case "include":
			more, err := includedKeys(words[1:], depth)
			if err != nil {
				return nil, err
			}
			values = append(values, more...)
		}
	}
	return values, nil
}

// includedKeys is revokedKeysOf for the files of an Include.
func includedKeys(patterns []string, depth int) (values []string, err error) {
	for _, pattern := range patterns {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join("/etc/ssh", pattern)
		}
		files, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			more, err := revokedKeysOf(file, depth+1)
			if err != nil {
				return nil, err
			}
			values = append(values, more...)
		}
	}
	return values, nil
}
