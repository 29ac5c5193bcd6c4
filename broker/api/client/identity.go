package client

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// ErrIdentity means that the Workload API gives a process several SVIDs and none is chosen, or not the chosen one.
var ErrIdentity = errors.New("it is not clear which SVID is this process's own")

// Identity chooses one of several SVIDs of a process: by its SPIFFE ID, or by the hint of its entry. The zero Identity
// takes the only one. Which one of several the Workload API names first is chance, so none is guessed.
type Identity struct {
	id   spiffeid.ID
	hint string
}

// ParseIdentity reads a SPIFFE ID, or a hint. Empty is the zero Identity.
func ParseIdentity(s string) (Identity, error) {
	if !strings.Contains(s, ":") {
		return Identity{hint: s}, nil
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return Identity{}, fmt.Errorf("%.80q is neither a SPIFFE ID nor a hint, which has no colon: %w", s, err)
	}
	return Identity{id: id}, nil
}

// IsZero reports whether nothing is chosen.
func (w Identity) IsZero() bool { return w == Identity{} }

func (w Identity) String() string {
	if w.hint != "" {
		return fmt.Sprintf("hint %q", w.hint)
	}
	return w.id.String()
}

// Choose returns the chosen SVID. Without a choice it returns the one with the present ID, which a process keeps, or the
// only one at the start. setting is where the user can choose. Every error wraps [ErrIdentity].
func (w Identity) Choose(all []*x509svid.SVID, present spiffeid.ID, setting string) (*x509svid.SVID, error) {
	var found []*x509svid.SVID
	for _, svid := range all {
		switch {
		case w.IsZero() && (present.IsZero() || svid.ID == present),
			!w.id.IsZero() && svid.ID == w.id,
			w.hint != "" && svid.Hint == w.hint:
			found = append(found, svid)
		}
	}
	given := "the Workload API gives this process " + namesOf(all)
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1 && w.IsZero():
		return nil, fmt.Errorf("%w: %s, and chance decides which is first: %s", ErrIdentity, given, setting)
	case len(found) > 1:
		return nil, fmt.Errorf("%w: %s, and several have %s", ErrIdentity, given, w)
	case w.IsZero() && len(all) > 0:
		return nil, fmt.Errorf("%w: %s, and no longer %s, with which it started: %s, or start it again",
			ErrIdentity, given, present, setting)
	}
	return nil, fmt.Errorf("%w: %s, and not %s, which was chosen: is its entry gone?", ErrIdentity, given, w)
}

// namesOf lists the SPIFFE IDs with their hints.
func namesOf(all []*x509svid.SVID) string {
	names := make([]string, 0, len(all))
	for _, svid := range all {
		name := svid.ID.String()
		if svid.Hint != "" {
			name += fmt.Sprintf(" (hint %q)", svid.Hint)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return "no SVID"
	}
	return strings.Join(names, " and ")
}

// chosen is a source of the Workload API that chooses its SVID anew at each update.
type chosen struct {
	*workloadapi.X509Source

	mu  sync.RWMutex // guards err
	err error        // of the last choice
}

// GetX509SVID implements [x509svid.Source].
func (c *chosen) GetX509SVID() (*x509svid.SVID, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.err != nil {
		return nil, c.err
	}
	return c.X509Source.GetX509SVID()
}

// CloserSource is a [Source] that must be closed.
type CloserSource interface {
	Source
	Close() error
}

// OpenIdentity opens the Workload API and waits for the chosen SVID. It chooses again at each update; while the choice
// fails the source has no SVID. The source outlives ctx. setting is where the user can choose.
func OpenIdentity(ctx context.Context, w Identity, setting string, options ...workloadapi.ClientOption) (CloserSource, error) {
	c := &chosen{}
	var present spiffeid.ID
	pick := func(all []*x509svid.SVID) *x509svid.SVID { // the source calls it for one update at a time
		svid, err := w.Choose(all, present, setting)
		if err == nil {
			present = svid.ID
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = err
		return svid
	}
	var err error
	c.X509Source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(options...),
		workloadapi.WithDefaultX509SVIDPicker(pick))
	if err != nil {
		return nil, err
	}
	if _, err := c.GetX509SVID(); err != nil {
		_ = c.Close() // the other error counts
		return nil, err
	}
	return c, nil
}
