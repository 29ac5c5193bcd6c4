package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/pawlsec/pawl/broker/agent"
)

// exampleBroker starts a broker for an example, on a unix socket, and sets PAWL_ADDRESS to it. A real
// broker has an address such as https://pawl.example.org:8443 and needs the other two variables as well.
func exampleBroker() (stop func()) {
	dir, err := os.MkdirTemp("", "pawl")
	if err != nil {
		log.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	h := &http.Server{Handler: newScript(nil)}
	go func() { _ = h.Serve(l) }() // it ends with Close
	before := os.Getenv("PAWL_ADDRESS")
	_ = os.Setenv("PAWL_ADDRESS", "unix:"+socket) // a plain name and value
	return func() {
		_ = os.Setenv("PAWL_ADDRESS", before)
		_ = h.Close()         // the example has its answers
		_ = os.RemoveAll(dir) // a temporary directory
	}
}

// A client needs three variables: PAWL_ADDRESS, PAWL_SERVER_ID and SPIFFE_ENDPOINT_SOCKET.
func ExampleFromEnvironment() {
	defer exampleBroker()()
	ctx := context.Background()

	client, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	d, err := client.Open(ctx, agent.Chain{
		Task:   "weekly report",
		Rights: []agent.Right{{Tool: "db.read", Use: true}},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("opened", d.Info().Chain)
	// Output:
	// opened ch000000000000000000000001
}

// The error names a missing variable and has an example value.
func ExampleFromEnvironment_missing() {
	_ = os.Unsetenv("PAWL_ADDRESS")
	_ = os.Setenv("PAWL_SERVER_ID", "spiffe://example.org/pawl")
	_ = os.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///run/spire/agent/public/api.sock")
	defer os.Unsetenv("PAWL_SERVER_ID")
	defer os.Unsetenv("SPIFFE_ENDPOINT_SOCKET")

	_, err := agent.FromEnvironment(context.Background())
	fmt.Println(err)
	// Output:
	// PAWL_ADDRESS is not set, for example PAWL_ADDRESS=https://pawl.example.org:8443
}

// The secret exists while the function runs. Closing the step revokes it.
func ExampleDelegation_Step() {
	defer exampleBroker()()
	ctx := context.Background()
	client, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	d, err := client.Open(ctx, agent.Chain{
		Task: "weekly report",
		Rights: []agent.Right{{
			Tool: "db.read", Use: true,
			Args: map[string]agent.Constraint{"table": agent.OneOf("orders", "items")},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}

	var kept *agent.Secret
	call := agent.Call{Tool: "db.read", Args: agent.Args{"table": "orders"}, Purpose: "sum of the week"}
	err = d.Step(ctx, call, func(ctx context.Context, s *agent.Secret) error {
		kept = s
		// Log in with s.Field("username") and s.Field("password"), and query under ctx: it ends when the
		// broker revokes the step.
		fmt.Printf("as %s, with password %t: %v\n", s.Field("username"), s.Field("password") != "", s)
		return nil
	})
	switch {
	case errors.Is(err, agent.ErrRevoked):
		log.Fatal("stop the work")
	case errors.Is(err, agent.ErrDenied):
		log.Fatal("policy does not allow it: ", err)
	case err != nil:
		log.Fatal(err)
	}
	fmt.Printf("after the step: %d bytes\n", len(kept.JSON()))
	// Output:
	// as reader, with password true: [redacted]
	// after the step: 0 bytes
}

// A step that outlives one function is closed by the caller.
func ExampleDelegation_Begin() {
	defer exampleBroker()()
	ctx := context.Background()
	client, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	d, err := client.Open(ctx, agent.Chain{Task: "weekly report", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		log.Fatal(err)
	}

	// The key makes it safe to send the same call again after a lost answer.
	step, err := d.Begin(ctx, agent.Call{Tool: "db.read", IdempotencyKey: "report-2030-01"})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("took", step.Grant().ID)
	if err := step.Close(ctx); err != nil {
		log.Fatal("the secret may still work: ", err)
	}
	fmt.Println(context.Cause(step.Context()))
	// Output:
	// took gr000000000000000000000001
	// context canceled
}

// A planner passes one table on to a writer, and the writer uses it.
func ExampleDelegation_Delegate() {
	defer exampleBroker()()
	ctx := context.Background()
	planner, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer planner.Close()
	d, err := planner.Open(ctx, agent.Chain{
		Task:   "weekly report",
		Depth:  1, // the writer may not pass it on
		Rights: []agent.Right{{Tool: "db.read", Use: true, Delegate: true}},
	})
	if err != nil {
		log.Fatal(err)
	}
	id, err := d.Delegate(ctx, "spiffe://example.org/writer", agent.Share{
		Rights: []agent.Right{{
			Tool: "db.read", Use: true,
			Args: map[string]agent.Constraint{"table": agent.OneOf("orders"), "limit": agent.Range(1, 1000)},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	message := string(id) // goes to the writer over any channel: it is no secret

	// In the process of spiffe://example.org/writer:
	writer, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer writer.Close()
	received, err := agent.ParseDelegationID(message)
	if err != nil {
		log.Fatal(err)
	}
	part, err := writer.Join(ctx, received)
	if err != nil {
		log.Fatal(err)
	}
	call := agent.Call{Tool: "db.read", Args: agent.Args{"table": "orders", "limit": 10}}
	err = part.Step(ctx, call, func(_ context.Context, s *agent.Secret) error {
		fmt.Println("the writer reads orders as", s.Field("username"))
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("under", part.ID(), "of", part.Info().Parent)
	// Output:
	// the writer reads orders as reader
	// under dl000000000000000000000002 of dl000000000000000000000001
}

// An orchestrator takes the step and never sees the secret. The worker collects it, once.
func ExampleClient_Collect() {
	defer exampleBroker()()
	ctx := context.Background()

	// The worker makes a key for one step. Its public half goes to the orchestrator.
	key, err := agent.NewSealKey()
	if err != nil {
		log.Fatal(err)
	}
	public := key.Public()

	// The orchestrator takes the step. The id of its grant goes to the worker.
	orchestrator, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer orchestrator.Close()
	d, err := orchestrator.Open(ctx, agent.Chain{
		Task:   "weekly report",
		Rights: []agent.Right{{Tool: "db.read", Use: true}},
	})
	if err != nil {
		log.Fatal(err)
	}
	step, err := d.Begin(ctx, agent.Call{
		Tool: "db.read", Args: agent.Args{"table": "orders"},
		Seal: &agent.Seal{Key: public, Collector: "spiffe://example.org/worker"},
	})
	if err != nil {
		log.Fatal(err)
	}
	message := string(step.Grant().ID)
	fmt.Printf("the orchestrator has %d bytes\n", len(step.Secret().JSON()))

	// The process of spiffe://example.org/worker collects the secret.
	worker, err := agent.FromEnvironment(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer worker.Close()
	grant, err := agent.ParseGrantID(message)
	if err != nil {
		log.Fatal(err)
	}
	secret, err := worker.Collect(ctx, grant, key)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("the worker has the login of", secret.Field("username"))
	secret.Wipe()
	_, err = worker.Collect(ctx, grant, key)
	fmt.Println("again:", errors.Is(err, agent.ErrConflict))

	// The orchestrator closes the step when the worker is done, which revokes the secret.
	if err := step.Close(ctx); err != nil {
		log.Fatal(err)
	}
	// Output:
	// the orchestrator has 0 bytes
	// the worker has the login of reader
	// again: true
}
