package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/envelope"
	"github.com/pawlsec/pawl/broker/yaml"
)

// Limits of a bundle, checked before anything is parsed.
const (
	MaxBundle   = 4 << 20      // bytes of a signed bundle
	MaxFile     = yaml.MaxFile // bytes of one file in it
	MaxTools    = 1024
	MaxPolicies = 10_000
)

// Source is a bundle's unsigned content. It is well-formed and its policies compile. The zero Source is empty.
type Source struct {
	content content
	payload []byte // canonical JSON of content; the signatures cover it
}

type content struct {
	Name       string                          `json:"name"`
	Version    int64                           `json:"version"`
	Tools      []toolDecl                      `json:"tools"`
	Policies   []document                      `json:"policies"`
	Issuers    []issuerDecl                    `json:"issuers,omitempty"`
	Schema     *document                       `json:"schema,omitempty"`
	Violations map[broker.ViolationCode]string `json:"violations,omitempty"`
}

type document struct {
	File string `json:"file"`
	Text string `json:"text"`
}

// Bundle is content signed by enough trusted keys, unless it comes from [Source.Unsigned].
type Bundle struct {
	Source
	Signers []string // ids of the keys with verified signatures, in the order of the envelope
}

// Name returns the bundle's name. Bundles of one name replace each other.
func (s Source) Name() string { return s.content.Name }

// Version returns the bundle's version, which only goes up; see [Replace].
func (s Source) Version() int64 { return s.content.Version }

// Digest returns "sha256:" and the hex digest of the payload.
func (s Source) Digest() string {
	sum := sha256.Sum256(s.payload)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Unsigned lets authors test policies, and `pawl dev` run them, before they are signed. A broker that serves others
// accepts bundles only from [Verify].
func (s Source) Unsigned() Bundle { return Bundle{Source: s} }

// Build reads an author's directory: bundle.yaml, tools.yaml, any number of *.cedar, and optionally violations.yaml,
// issuers.yaml and schema.cedarschema. It ignores other files. Errors begin with the file, and with the line where it is known.
func Build(dir fs.FS) (Source, error) {
	s, err := read(dir)
	if err != nil {
		return Source{}, err
	}
	_, err = Load(s.Unsigned())
	return s, err
}

// read reads an author's directory without a check of its policies.
func read(dir fs.FS) (Source, error) {
	var c content
	if err := c.readHead(dir); err != nil {
		return Source{}, err
	}
	if err := c.readTools(dir); err != nil {
		return Source{}, err
	}
	if err := c.readIssuers(dir); err != nil {
		return Source{}, err
	}
	if err := c.readCedar(dir); err != nil {
		return Source{}, err
	}
	return c.seal()
}

func (c *content) readHead(dir fs.FS) error {
	var head struct {
		Name    string `yaml:"name"`
		Version int64  `yaml:"version"`
	}
	raw, err := readFile(dir, "bundle.yaml")
	if err != nil {
		return err
	}
	if err := yaml.Read("bundle.yaml", raw, &head); err != nil {
		return err
	}
	c.Name, c.Version = head.Name, head.Version
	raw, err = readFile(dir, "violations.yaml")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return yaml.Read("violations.yaml", raw, &c.Violations)
}

func (c *content) readTools(dir fs.FS) error {
	raw, err := readFile(dir, "tools.yaml")
	if err != nil {
		return err
	}
	var doc struct {
		Tools []yaml.Row[toolYAML] `yaml:"tools"`
	}
	if err := yaml.Read("tools.yaml", raw, &doc); err != nil {
		return err
	}
	c.Tools = []toolDecl{}
	for _, r := range doc.Tools {
		d, err := r.Value.decl()
		if err == nil {
			_, err = d.tool()
		}
		if err != nil {
			return fmt.Errorf("tools.yaml:%d: tool %.60q: %w", r.Line, r.Value.Name, err)
		}
		c.Tools = append(c.Tools, d)
	}
	slices.SortFunc(c.Tools, func(a, b toolDecl) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func (c *content) readIssuers(dir fs.FS) error {
	raw, err := readFile(dir, "issuers.yaml")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var doc struct {
		Issuers []yaml.Row[issuerDecl] `yaml:"issuers"`
	}
	if err := yaml.Read("issuers.yaml", raw, &doc); err != nil {
		return err
	}
	for _, r := range doc.Issuers {
		if age, err := time.ParseDuration(r.Value.MaxAge); err == nil {
			r.Value.MaxAge = age.String() // one spelling; issuer refuses text that does not parse
		}
		if _, err := r.Value.issuer(); err != nil {
			return fmt.Errorf("issuers.yaml:%d: %w", r.Line, err)
		}
		c.Issuers = append(c.Issuers, r.Value)
	}
	return nil
}

func (c *content) readCedar(dir fs.FS) error {
	names, err := fs.Glob(dir, "*.cedar")
	if err != nil {
		return fmt.Errorf("listing policies: %w", err)
	}
	c.Policies = []document{}
	for _, name := range slices.Sorted(slices.Values(names)) {
		raw, err := readFile(dir, name)
		if err != nil {
			return err
		}
		c.Policies = append(c.Policies, document{name, string(raw)})
	}
	raw, err := readFile(dir, "schema.cedarschema")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	c.Schema = &document{"schema.cedarschema", string(raw)}
	return nil
}

// readFile reads a file of a bundle. It checks the size before reading.
func readFile(dir fs.FS, name string) ([]byte, error) {
	info, err := fs.Stat(dir, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if info.Size() > MaxFile {
		return nil, fmt.Errorf("%s: larger than %d bytes", name, MaxFile)
	}
	raw, err := fs.ReadFile(dir, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return raw, nil
}

// seal checks the content and encodes it in its canonical form.
func (c content) seal() (Source, error) {
	if err := c.check(); err != nil {
		return Source{}, err
	}
	raw, err := json.Marshal(c, json.Deterministic(true))
	if err != nil {
		return Source{}, fmt.Errorf("encoding bundle: %w", err)
	}
	if len(raw) > MaxBundle/2 { // base64 and signatures must fit as well
		return Source{}, fmt.Errorf("bundle: content is larger than %d bytes", MaxBundle/2)
	}
	return Source{c, raw}, nil
}

// parsePayload decodes a payload. It refuses a payload that does not encode to the same bytes, so that two readers
// cannot read it differently.
func parsePayload(raw []byte) (Source, error) {
	var c content
	if err := json.Unmarshal(raw, &c, json.RejectUnknownMembers(true)); err != nil {
		return Source{}, fmt.Errorf("bundle payload: %w", err)
	}
	s, err := c.seal()
	if err != nil {
		return Source{}, err
	}
	if !bytes.Equal(s.payload, raw) {
		return Source{}, errors.New("bundle payload is not in canonical form")
	}
	return s, nil
}

func (c content) check() error {
	if _, err := broker.ParseToolName(c.Name); err != nil {
		return fmt.Errorf("bundle.yaml: name %.60q must be lower-case words joined by dots or hyphens", c.Name)
	}
	if c.Version < 1 || c.Version > 1<<53 { // exact in any JSON reader
		return errors.New("bundle.yaml: version must be an integer from 1 to 2^53")
	}
	if len(c.Tools) > MaxTools {
		return fmt.Errorf("tools.yaml: more than %d tools", MaxTools)
	}
	for i := 1; i < len(c.Tools); i++ {
		if c.Tools[i-1].Name >= c.Tools[i].Name {
			return fmt.Errorf("tools.yaml: tool %.60q is declared twice or out of order", c.Tools[i].Name)
		}
	}
	if _, err := c.issuers(); err != nil {
		return err
	}
	last := ""
	for _, d := range c.Policies {
		if path.Ext(d.File) != ".cedar" || !plainName(d.File) || d.File <= last {
			return fmt.Errorf("policy file %.60q has a bad name, is repeated or is out of order", d.File)
		}
		if last = d.File; len(d.Text) > MaxFile || !utf8.ValidString(d.Text) {
			return fmt.Errorf("%s: larger than %d bytes or not UTF-8", d.File, MaxFile)
		}
	}
	if c.Schema != nil && (c.Schema.File != "schema.cedarschema" || len(c.Schema.Text) > MaxFile) {
		return fmt.Errorf("schema.cedarschema: bad name, or larger than %d bytes", MaxFile)
	}
	for _, code := range slices.Sorted(maps.Keys(c.Violations)) {
		if _, ok := broker.ParseConsequence(c.Violations[code]); !ok {
			return fmt.Errorf("violations.yaml: %q: consequence %.40q is unknown", code, c.Violations[code])
		}
		if !words(string(code)) {
			return fmt.Errorf("violations.yaml: code %.60q must be lower-case words joined by underscores", code)
		}
	}
	return nil
}

// issuers checks all of them.
func (c content) issuers() (envelope.Issuers, error) {
	if len(c.Issuers) > maxIssuers {
		return envelope.Issuers{}, fmt.Errorf("issuers.yaml: more than %d issuers", maxIssuers)
	}
	var list []envelope.Issuer
	for _, d := range c.Issuers {
		i, err := d.issuer()
		if err != nil {
			return envelope.Issuers{}, fmt.Errorf("issuers.yaml: issuer %.60q: %w", d.Issuer, err)
		}
		list = append(list, i)
	}
	all, err := envelope.New(list...)
	if err != nil {
		return all, fmt.Errorf("issuers.yaml: %w", err)
	}
	return all, nil
}

// words reports whether s has the form of a violation code.
func words(s string) bool {
	return len(s) <= 64 && all(strings.Split(s, "_"), func(w string) bool {
		return w != "" && strings.Trim(w, "abcdefghijklmnopqrstuvwxyz0123456789") == ""
	})
}
