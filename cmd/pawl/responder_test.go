package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/pawlsec/pawl/broker"
	"github.com/pawlsec/pawl/broker/brokertest"
	"github.com/pawlsec/pawl/broker/engine"
	"github.com/pawlsec/pawl/broker/policy"
)

// scene is the environment of a responder's script: a real engine in memory, with one socket for each of two
// operators, $PAWL_SOCKET and $SECOND.
type scene struct {
	t      *testing.T
	engine *engine.Engine
	target *brokertest.Target
	roots  map[string]broker.Delegation
	served []*httptest.Server
}

// TestResponderScripts runs a responder's commands against a broker with working agents. Besides the commands
// of testscript, scripts have
//
//	agent NAME    opens a chain and sets $CHAIN to its id
//	step NAME     takes a step in it, sets $GRANT to its grant and writes its password to the file secret
//	target-down   the target stops answering, so that nothing is proven; target-up undoes it
//	disconnect    closes every connection of an operator
//	json FILE     fails unless FILE has only JSON values
func TestResponderScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{Dir: "testdata/responder", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error { return newScene(t, e) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"agent": onScene(1, func(s *scene, ts *testscript.TestScript, args []string) error {
				root, err := s.engine.Open(t.Context(), agentNamed(args[0]),
					broker.OpenRequest{Task: "work of " + args[0], Rights: []broker.Right{{Tool: "db", Use: true}}})
				s.roots[args[0]] = root
				ts.Setenv("CHAIN", string(root.Chain))
				return err
			}),
			"step": onScene(1, func(s *scene, ts *testscript.TestScript, args []string) error {
				got, err := s.engine.Issue(t.Context(), agentNamed(args[0]),
					broker.StepRequest{Delegation: s.roots[args[0]].ID, Tool: "db"})
				if err != nil {
					return err
				}
				ts.Setenv("GRANT", string(got.Grant.ID))
				var secret struct{ Password string }
				if err := json.Unmarshal(got.Secret.Reveal(), &secret); err != nil {
					return err
				}
				return os.WriteFile(ts.MkAbs("secret"), []byte(secret.Password+"\n"), 0o600)
			}),
			"target-down": onScene(0, func(s *scene, _ *testscript.TestScript, _ []string) error {
				s.target.Fail(func(point string) error {
					if point == "prove" {
						return errors.New("the target does not answer")
					}
					return nil
				})
				return nil
			}),
			"target-up": onScene(0, func(s *scene, _ *testscript.TestScript, _ []string) error {
				s.target.Fail(nil)
				return nil
			}),
			"disconnect": onScene(0, func(s *scene, _ *testscript.TestScript, _ []string) error {
				for _, h := range s.served {
					h.CloseClientConnections()
				}
				return nil
			}),
			"json": onScene(1, func(_ *scene, ts *testscript.TestScript, args []string) error {
				return onlyJSON(ts.MkAbs(args[0]))
			}),
		}})
}

func newScene(t *testing.T, e *testscript.Env) error {
	dir, err := os.MkdirTemp("", "pawl") // t.TempDir is too long for a socket's path
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) }) // a temporary directory
	key, _, err := policy.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	s := &scene{t: t, target: brokertest.NewTarget(), roots: map[string]broker.Delegation{}}
	s.engine = startEngine(t, s.target)
	for variable, name := range map[string]string{"PAWL_SOCKET": "ann", "SECOND": "ben"} {
		socket := filepath.Join(dir, name)
		s.served = append(s.served, serveOperators(t, s.engine, key, name, socket))
		e.Setenv(variable, socket)
	}
	e.Setenv("PAWL_OPERATORS", "")
	e.Values["scene"] = s
	return nil
}

func onScene(
	args int, do func(*scene, *testscript.TestScript, []string) error,
) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, given []string) {
		if neg || len(given) != args {
			ts.Fatalf("the command takes %d arguments, and no !", args)
		}
		ts.Check(do(ts.Value("scene").(*scene), ts, given))
	}
}

func agentNamed(name string) broker.Caller {
	return broker.Caller{ID: spiffeid.RequireFromString("spiffe://example.org/" + name),
		Proof: broker.ProofX509, NotAfter: time.Now().Add(time.Hour)}
}

func onlyJSON(file string) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	values := 0
	for dec := json.NewDecoder(bytes.NewReader(raw)); ; values++ {
		var v any
		if err := dec.Decode(&v); errors.Is(err, io.EOF) && values > 0 {
			return nil
		} else if err != nil {
			return err
		}
	}
}
