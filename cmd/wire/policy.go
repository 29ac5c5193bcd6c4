package wire

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/policy"
)

// LoadPolicy verifies and loads the configured bundle.
func LoadPolicy(c Policy) (*policy.Running, error) {
	jws, trust, err := readBundle(c)
	if err != nil {
		return nil, err
	}
	running, err := policy.NewRunning(jws, trust)
	if err != nil {
		return nil, fmt.Errorf("policy bundle %q: %w", c.Bundle, err)
	}
	return running, nil
}

func readBundle(c Policy) ([]byte, policy.Trust, error) {
	raw, err := os.ReadFile(c.Keys)
	if err != nil {
		return nil, policy.Trust{}, fmt.Errorf("policy keys: %w", err)
	}
	keys, err := policy.ParseKeySet(raw)
	if err != nil {
		return nil, policy.Trust{}, fmt.Errorf("policy keys %q: %w", c.Keys, err)
	}
	jws, err := os.ReadFile(c.Bundle)
	if err != nil {
		return nil, policy.Trust{}, fmt.Errorf("policy bundle: %w", err)
	}
	return jws, policy.Trust{Keys: keys, Need: max(c.Need, 1)}, nil
}

// ReloadPolicy reads the bundle file again. The bundle comes into force when it is newer, the backends
// accept its tools and the ledger has recorded it; otherwise the running bundle stays. The candidate
// is read again in both cases.
func (s *Server) ReloadPolicy(ctx context.Context, c Config) (*policy.Policy, error) {
	defer s.reloadCandidate(c) // afterwards, because the candidate may just have come into force
	jws, _, err := readBundle(c.Policy)
	if err != nil {
		return nil, err
	}
	next, err := s.Policy.Replace(jws, false, func(next *policy.Policy) error {
		if err := checkTools(next.Tools(), s.targets); err != nil {
			return err
		}
		return s.adopt(ctx, next, 0)
	})
	if err != nil {
		return nil, fmt.Errorf("policy bundle %q: %w", c.Policy.Bundle, err)
	}
	logWarnings(s.log, next)
	return next, nil
}

// newShadow logs and counts the questions that a candidate would answer differently. A log line has the
// caller, the tool and both answers; it has no arguments.
func newShadow(log *slog.Logger, m *metrics) *policy.Shadow {
	return policy.NewShadow(policy.ShadowReport{
		Differs: func(d policy.Difference) {
			m.differs(d.Question)
			log.Info("the candidate policy differs", "action", d.Question.Action, "tool", d.Question.Tool.Name,
				"chain", d.Question.Chain.ID, "difference", d.String())
		},
		Missed: func(err error) {
			m.missed.Inc()
			if !errors.Is(err, policy.ErrShadowBusy) { // under load, that would be a line for each question
				log.Warn("the candidate policy was not compared", "error", err)
			}
		},
	})
}

// reloadCandidate reads the candidate bundle again. A candidate that could not come into force is not
// evaluated: nothing is compared, and nothing else changes.
func (s *Server) reloadCandidate(c Config) {
	next, err := loadCandidate(c, s.targets)
	if err != nil {
		s.log.Error("the candidate policy bundle is refused; nothing is compared", "error", err)
	}
	if next != nil && next.Digest() == s.Policy.Current().Digest() {
		s.log.Info("the candidate policy bundle is in force; there is nothing to compare", "bundle", next.Digest())
		next = nil
	}
	if next != nil {
		s.log.Info("candidate policy bundle", "bundle", next.Digest(), "version", next.Bundle().Version())
		logWarnings(s.log, next)
	}
	s.shadow.Try(next)
	s.metrics.candidate.Store(next != nil)
}

// loadCandidate verifies and loads the candidate bundle; nil without a configured candidate.
func loadCandidate(c Config, targets map[string]broker.Backend) (*policy.Policy, error) {
	if c.Policy.Candidate == "" {
		return nil, nil
	}
	from := c.Policy
	from.Bundle = c.Policy.Candidate
	running, err := LoadPolicy(from)
	if err != nil {
		return nil, err
	}
	if err := checkTools(running.Current().Tools(), targets); err != nil {
		return nil, fmt.Errorf("policy bundle %q: %w", from.Bundle, err)
	}
	return running.Current(), nil
}

// CheckPolicy checks whether a start or a reload would accept the bundle, and the candidate if one is
// configured. It checks their signatures, and their tools with the plugins. It does not open the ledger, so it
// does not know which version was in force last.
func CheckPolicy(c Config) (*policy.Policy, error) {
	running, err := LoadPolicy(c.Policy)
	if err != nil {
		return nil, err
	}
	targets, done, err := offline(c.Backends)
	if err != nil {
		return nil, err
	}
	defer done()
	if err := checkTools(running.Current().Tools(), targets); err != nil {
		return nil, fmt.Errorf("policy bundle %q: %w", c.Policy.Bundle, err)
	}
	_, err = loadCandidate(c, targets)
	return running.Current(), err
}

// adopt records in the ledger that a bundle comes into force. rollback is the version that the user who started
// the broker allows to follow a newer one; zero: none.
func (s *Server) adopt(ctx context.Context, p *policy.Policy, rollback int64) error {
	b := p.Bundle()
	a := broker.Adoption{Name: b.Name(), Version: b.Version(), Digest: p.Digest(), Signers: b.Signers}
	if rollback != 0 {
		if rollback != b.Version() {
			return fmt.Errorf("the rollback is to version %d, but policy bundle %q is version %d",
				rollback, b.Name(), b.Version())
		}
		a.Back, a.By = true, fmt.Sprintf("local:uid=%d", os.Getuid())
	}
	return s.Broker.Adopt(ctx, a)
}

func logWarnings(log *slog.Logger, p *policy.Policy) {
	for _, w := range p.Warnings() {
		log.Warn("policy", "warning", w)
	}
}
