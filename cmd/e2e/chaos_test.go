package e2e_test

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pawlsec/pawl/cmd/dev"
)

var (
	everything = flag.Bool("chaos", false, "play every mishap at every point, with pauses of 30 s; takes most of an hour")
	seed       = flag.Int("chaos.seed", 1, "which of the mishaps a sample plays at each point")
)

// mishap is a fault that hits a broker at a point.
type mishap string

const (
	killed      mishap = "killed"      // by kill -9, then restarted
	paused      mishap = "paused"      // stopped, as by a hypervisor, until its secrets have expired
	ledgerFails mishap = "ledger"      // before a commit: refused; after it: committed, and reported as failed
	vault500    mishap = "Vault 500"   // before an act: instead of the act; after it: instead of its answer
	answerLost  mishap = "answer lost" // the connection to Vault is cut, at the same two sides
	targetFails mishap = "target"      // PostgreSQL fails before an act, or after it has completed the act
)

var mishaps = []mishap{killed, paused, ledgerFails, vault500, answerLost, targetFails}

// vaultActs maps the acts that are one request to Vault to the path of the request.
var vaultActs = map[string]string{"branch": tokenPath, "child": tokenPath, "mint": mintPath, "kill": killPath, "gone": gonePath}

// happens reports whether m can happen at a point.
func (m mishap) happens(point string) bool {
	act := actOf(point)
	switch m {
	case ledgerFails:
		return strings.HasPrefix(act, "commit of ")
	case vault500, answerLost:
		return vaultActs[act] != ""
	case targetFails:
		return slices.Contains([]string{"prepare", "sever", "prove"}, act)
	}
	return true
}

// placeOf gives a point without its number. actOf also drops its side.
func placeOf(point string) string { place, _, _ := strings.Cut(point, " #"); return place }
func actOf(point string) string   { _, act, _ := strings.Cut(placeOf(point), " "); return act }

// cell is one mishap of one broker, possibly after an earlier broker was killed.
type cell struct {
	after string // the point at which the earlier one was killed; empty: there was none
	point string
	mishap
}

// pasts are the starts of the walks: a fresh broker, one that finds a mint with an unknown outcome, and one that finds
// a fence with nothing severed yet.
var pasts = []string{"", "after mint #2", "after commit of fence #1"}

// TestChaos injects every kind of mishap at the points around a broker's acts of issuing, closing, revoking and
// resuming, one run for each. Agents and an operator continue meanwhile and retry unanswered requests. The oracle
// checks each run: the ledger knows every live secret; no secret is handed out after a fence was acknowledged; no
// revocation is CLOSED while a login works; no acknowledged change is lost; and in the end everything is dead and
// CLOSED without help.
//
// The sample has each point once and each mishap many times. With -chaos, as in `make chaos`, every cell is played.
func TestChaos(t *testing.T) {
	t.Parallel()
	need(t, true)
	envs := environments(t)
	var cells []cell
	for _, past := range pasts {
		points := walkAfter(t, envs, past)
		t.Logf("%d points after %q: %s", len(points), past, strings.Join(points, ", "))
		cells = append(cells, cellsOf(past, points)...)
	}
	var score scores
	t.Run("cells", func(t *testing.T) {
		for _, c := range cells {
			t.Run(fmt.Sprintf("%s/%s/%s", cmp.Or(c.after, "fresh"), c.point, c.mishap), func(t *testing.T) {
				t.Parallel()
				env := <-envs
				defer func() { envs <- env }()
				r := newRun(t, env, c)
				r.play()
				score.add(c, r.met(), !t.Failed())
			})
		}
	})
	t.Logf("mishaps that happened, of runs; the oracle checked every run:\n%s", score.table())
	score.check(t)
}

// cellsOf gives the cells for the points of a walk: every mishap that can happen there, or a sample.
func cellsOf(past string, points []string) (cells []cell) {
	for i, point := range points {
		for _, m := range mishaps {
			if m.happens(point) && (*everything || sampled(past, point, m, i+*seed)) {
				cells = append(cells, cell{past, point, m})
			}
		}
	}
	return cells
}

// resuming lists the acts that only a broker with a past performs.
var resuming = []string{"commit of resume", "sever", "kill", "prove", "gone", "commit of end", "commit of closed", "commit of evidence", "commit of closure"}

// sampled reports whether the sample has this mishap at this point; n numbers the points. Most kills are in
// TestKillWalk instead.
func sampled(past, point string, m mishap, n int) bool {
	if past != "" && (!slices.Contains(resuming, actOf(point)) || !strings.HasSuffix(point, "#1")) {
		return false
	}
	switch {
	case m == killed && past == "":
		act := actOf(point)
		return strings.Contains(act, "fence") || strings.Contains(act, "closure") || strings.Contains(act, "delegate")
	case n%4 == 0:
		return m == paused
	case past != "" && n%2 == 1:
		return m == killed
	case m == vault500, m == answerLost:
		return (m == vault500) == (n%8 < 4)
	}
	return m == ledgerFails || m == targetFails
}

// walkAfter plays once without a mishap and gives the points that the broker passed, at most two of a kind.
func walkAfter(t *testing.T, envs chan *dev.Env, past string) []string {
	env := <-envs
	defer func() { envs <- env }()
	r := newRun(t, env, cell{after: past})
	r.play()
	points := firstTwo(r.walked())
	mustPass(t, points, "commit of resume", "kill", "sever", "prove", "gone", "commit of closed", "commit of closure")
	if past == "" {
		mustPass(t, points, "commit of open", "commit of delegate", "commit of token", "commit of intent", "commit of handle", "commit of issued",
			"commit of end", "commit of fence", "commit of violation+fence", "prepare", "branch", "child", "mint")
	}
	return points
}

// scores counts runs and the mishaps that happened in them.
type scores struct {
	mu   sync.Mutex // guards runs
	runs map[string]map[mishap]score
}

type score struct{ runs, met, failed int }

func (s *scores) add(c cell, met, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := fmt.Sprintf("%s: %s", cmp.Or(c.after, "fresh"), placeOf(c.point))
	for _, name := range []string{row, total} {
		if s.runs == nil {
			s.runs = map[string]map[mishap]score{}
		}
		if s.runs[name] == nil {
			s.runs[name] = map[mishap]score{}
		}
		one := s.runs[name][c.mishap]
		if one.runs++; met {
			one.met++
		}
		if !ok {
			one.failed++
		}
		s.runs[name][c.mishap] = one
	}
}

const total = "all"

// table has a row for each place, and one for the total.
func (s *scores) table() string {
	var out strings.Builder
	line := func(name string, field func(mishap) string) {
		fmt.Fprintf(&out, "%-56s", name)
		for _, m := range mishaps {
			fmt.Fprintf(&out, " %12s", field(m))
		}
		out.WriteString("\n")
	}
	names := []string{}
	for name := range s.runs {
		if name != total {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	line("", func(m mishap) string { return string(m) })
	for _, name := range append(names, total) {
		line(name, func(m mishap) string {
			one, ok := s.runs[name][m]
			switch {
			case !ok:
				return "-"
			case one.failed > 0:
				return fmt.Sprintf("%d FAILED", one.failed)
			}
			return fmt.Sprintf("%d of %d", one.met, one.runs)
		})
	}
	return out.String()
}

// check fails when a mishap never happened, or when so many points were missed that the runs prove little. Background
// work varies between runs, so some points are not reached in some runs.
func (s *scores) check(t *testing.T) {
	t.Helper()
	for _, m := range mishaps {
		if one := s.runs[total][m]; one.met == 0 || one.met*10 < one.runs*8 {
			t.Errorf("%q happened in %d of %d runs", m, one.met, one.runs)
		}
	}
}

var errMishap = errors.New("injected failure of the disk or the target")

// pause gives the duration for which a paused broker is stopped. It is also the life of the secrets in such a run.
func pause() time.Duration {
	if *everything {
		return 30 * time.Second
	}
	return 2 * time.Second
}
