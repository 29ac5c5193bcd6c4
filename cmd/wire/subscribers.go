package wire

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/pawlsec/pawl/broker/signals"
)

// Subscriber is a receiver of this broker's security events, and how the broker authenticates it.
type Subscriber struct {
	URL      string `yaml:"url"`      // its push endpoint (RFC 8935), https; required
	Audience string `yaml:"audience"` // the aud claim of its tokens; required
	// PEM file of the authorities of its certificate; empty: the system's, or with server_id the Workload API's
	// bundle of its trust domain
	CA string `yaml:"ca"`
	// the SPIFFE ID that its certificate must have; empty: the certificate must have the URL's host name
	ServerID string `yaml:"server_id"`
	// authenticate with the broker's own X.509-SVID; there is no other way, so there are no static secrets
	MTLS   bool     `yaml:"mtls"`
	Events []string `yaml:"events"` // of session-revoked, chain-fenced, closure, freeze, unfreeze and canary; empty: all
}

var subscriberName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (s Subscriber) check(name string) error {
	at := "subscribers." + name
	var wrong []error
	if !subscriberName.MatchString(name) {
		wrong = append(wrong, fmt.Errorf("%s: a name is 1 to 63 lower-case letters, digits and dashes", at))
	}
	u, err := url.Parse(s.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "" {
		wrong = append(wrong, fmt.Errorf("%s.url is required, and must be https without a user", at))
	}
	if s.Audience == "" {
		wrong = append(wrong, fmt.Errorf("%s.audience is required", at))
	}
	if s.ServerID != "" {
		if _, err := spiffeid.FromString(s.ServerID); err != nil {
			wrong = append(wrong, fmt.Errorf("%s.server_id: %w", at, err))
		}
	}
	for _, kind := range s.Events {
		if !slices.Contains(signals.Kinds(), kind) {
			wrong = append(wrong, fmt.Errorf("%s.events: there is no event %q", at, kind))
		}
	}
	return errors.Join(wrong...)
}

// tls configures how the broker authenticates the subscriber, and itself to the subscriber.
func (s Subscriber) tls(svids *svidSource) (*tls.Config, error) {
	var authorities []*x509.Certificate
	if s.CA != "" {
		raw, err := os.ReadFile(s.CA)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("ca %q: %w", s.CA, err)
			}
			authorities = append(authorities, cert)
		}
		if len(authorities) == 0 {
			return nil, fmt.Errorf("ca %q holds no certificate", s.CA)
		}
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	switch {
	case s.ServerID != "":
		id, err := spiffeid.FromString(s.ServerID)
		if err != nil {
			return nil, fmt.Errorf("server_id: %w", err)
		}
		var bundles x509bundle.Source = svids
		if len(authorities) > 0 {
			bundles = x509bundle.FromX509Authorities(id.TrustDomain(), authorities)
		}
		c = tlsconfig.TLSClientConfig(bundles, tlsconfig.AuthorizeID(id))
	case len(authorities) > 0:
		c.RootCAs = x509.NewCertPool()
		for _, cert := range authorities {
			c.RootCAs.AddCert(cert)
		}
	}
	if s.MTLS {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate(svids) }
	}
	return c, nil
}

// CheckSubscribers reads the files that the subscribers' entries name.
func CheckSubscribers(c Config) error {
	for name, s := range c.Subscribers {
		if _, err := s.tls(nil); err != nil {
			return fmt.Errorf("subscribers.%s.%w", name, err)
		}
	}
	return nil
}

// newSender makes the sender of events to the configured subscribers; nil without subscribers.
func newSender(
	c Config, svids *svidSource, source signals.Source, alarm func(string, error), log *slog.Logger,
) (*signals.Sender, error) {
	if len(c.Subscribers) == 0 {
		return nil, nil
	}
	key, err := signingKey(c)
	if err != nil {
		return nil, err
	}
	tester, err := SelfTester(c)
	if err != nil {
		return nil, err
	}
	config := signals.SenderConfig{Mute: tester, Source: source, Key: key, Now: time.Now, Alarm: alarm, Log: log,
		Issuer: cmp.Or(c.Issuer, "https://"+c.TrustDomains[0]+"/pawl")}
	for name, s := range c.Subscribers {
		trust, err := s.tls(svids)
		if err != nil {
			return nil, fmt.Errorf("subscribers.%s.%w", name, err)
		}
		config.Subscribers = append(config.Subscribers,
			signals.Subscriber{Name: name, URL: s.URL, Audience: s.Audience, TLS: trust, Kinds: s.Events})
	}
	return signals.NewSender(config)
}

// startSender starts to push events to the subscribers.
func (s *Server) startSender(c Config, svids *svidSource, alarm func(string, error), log *slog.Logger) error {
	sender, err := newSender(c, svids, s.Broker, alarm, log)
	if err != nil || sender == nil {
		return err
	}
	for name := range c.Subscribers {
		s.metrics.addSubscriber(name, func() time.Duration { return sender.Lag(name) })
	}
	sender.Start()
	s.onClose(sender.Close)
	return nil
}
