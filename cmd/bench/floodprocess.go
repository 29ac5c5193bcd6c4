package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/cmd/bench/flooder"
	"github.com/pawlsec/pawl/cmd/bench/process"
	"github.com/pawlsec/pawl/cmd/dev"
)

// flooderCommand is the argument that makes this program a flooder, before the file with its orders.
const flooderCommand = "flooder"

// flood is a process that floods a broker.
type flood struct {
	cmd *exec.Cmd
	in  io.Closer // its end ends the flood
	out *bufio.Reader
}

// startFlooder starts a flood and returns when it is complete.
func (w *world) startFlooder(ctx context.Context, dir string) (*flood, error) {
	loud, err := w.agent("bench-loud")
	if err != nil {
		return nil, err
	}
	defer loud.Close() //nolint:errcheck // it always succeeds
	d, err := loud.Open(ctx, agent.Chain{Task: "loops", Rights: []agent.Right{{Tool: "db.read", Use: true}}})
	if err != nil {
		return nil, err
	}
	o := flooder.Orders{Address: w.broker.Agents, Path: "/v1/delegations/" + string(d.ID()) + "/steps"}
	if o.Loud, err = w.identity("bench-loud"); err != nil {
		return nil, err
	}
	for i := range flooder.IDs {
		id, err := w.identity(fmt.Sprintf("bench-slow-%d", i))
		if err != nil {
			return nil, err
		}
		o.Slow = append(o.Slow, id)
	}
	raw, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "orders.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	f := &flood{cmd: exec.CommandContext(ctx, "nice", "-n", "10", program, flooderCommand, file)}
	f.cmd.Stderr, f.cmd.SysProcAttr = os.Stderr, process.WithParent()
	if f.in, err = f.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f.out = bufio.NewReader(out)
	if err := f.cmd.Start(); err != nil {
		return nil, err
	}
	if line, err := f.out.ReadString('\n'); err != nil {
		f.kill()
		return nil, fmt.Errorf("the flooder ended: %q, %w", line, err)
	}
	return f, nil
}

// identity returns an SVID of an agent.
func (w *world) identity(name string) (id flooder.Identity, err error) {
	svid, err := w.env.Identities.X509SVID(dev.Agent(name))
	if err != nil {
		return id, err
	}
	id.Certificate, id.Key, err = svid.Marshal()
	return id, err
}

// end ends the flood and returns its counts.
func (f *flood) end() (s flooder.Sent, err error) {
	if err := f.in.Close(); err != nil {
		return s, err
	}
	err = json.NewDecoder(f.out).Decode(&s)
	return s, errors.Join(err, f.cmd.Wait())
}

// kill ends the process, if it has not ended.
func (f *flood) kill() {
	if f.cmd.ProcessState == nil {
		_ = f.cmd.Process.Kill()
		_ = f.cmd.Wait() // it was killed
	}
}
