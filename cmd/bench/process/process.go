// Package process starts a broker in a process of its own, and reads the system's figures of processes and the machine.
package process

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Broker is `pawl server` in a process of its own, so that its CPU time and memory can be read.
type Broker struct {
	Agents  string        // address of the agents' listener
	Started time.Duration // until it served
	cmd     *exec.Cmd
	exited  chan struct{}
}

// PID is that of the process.
func (p *Broker) PID() int { return p.cmd.Process.Pid }

// StartBroker starts the program, with its first arguments, and returns when it serves.
func StartBroker(ctx context.Context, program []string, config, log string) (*Broker, error) {
	cmd := exec.Command(program[0], append(program[1:len(program):len(program)], "server", "--config", config)...)
	cmd.SysProcAttr = WithParent()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	file, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	p := &Broker{cmd: cmd, exited: make(chan struct{})}
	serving := make(chan string, 1)
	go func() {
		defer close(p.exited)
		readLog(stderr, file, serving)
		_ = cmd.Wait()   // it was stopped, or its log has the reason
		_ = file.Close() // the log of a run that has ended
	}()
	select {
	case p.Agents = <-serving:
		p.Started = time.Since(began)
		return p, nil
	case <-p.exited:
		text, _ := os.ReadFile(log)
		return nil, fmt.Errorf("the broker ended: %s", bytes.TrimSpace(text[max(0, len(text)-1000):]))
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), p.Stop())
	}
}

// readLog copies the log without the line of each request, and sends the address of each "serving" line.
func readLog(from io.Reader, to io.Writer, serving chan<- string) {
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct{ Msg, Agents string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "serving" {
			serving <- line.Agents
		}
		if line.Msg != "request" {
			_, _ = fmt.Fprintf(to, "%s\n", lines.Bytes()) // the log is only read after a failure
		}
	}
	_, _ = io.Copy(io.Discard, from) // a line longer than the buffer must not block the broker
}

// Stop ends the process and returns when it is gone.
func (p *Broker) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.exited:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill() // it did not stop in time
		<-p.exited
	}
	return nil
}

// errNoProc means that this system has no /proc as Linux has.
var errNoProc = errors.New("there is no /proc")

// CPUTime gives the processor time that a process has used, to the system's tick of 10 ms.
func CPUTime(pid int) (time.Duration, error) {
	fields, err := procStat(pid)
	if err != nil {
		return 0, err
	}
	user, userErr := strconv.ParseInt(fields[11], 10, 64)
	system, systemErr := strconv.ParseInt(fields[12], 10, 64)
	if err := errors.Join(userErr, systemErr); err != nil {
		return 0, err
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}

// procStat gives the fields of /proc/PID/stat from the state on.
func procStat(pid int) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoProc, err)
	}
	_, rest, ok := strings.Cut(string(raw), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 13 {
		return nil, errNoProc
	}
	return fields, nil
}

// IdleTime gives the time for which processors had nothing to do, of all processors together, since the machine started.
func IdleTime() (time.Duration, error) {
	line, err := procLine("/proc/stat", "cpu ")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(line)
	if len(fields) < 5 {
		return 0, errNoProc
	}
	idle, idleErr := strconv.ParseInt(fields[3], 10, 64)
	waiting, waitingErr := strconv.ParseInt(fields[4], 10, 64) // for a disk
	return time.Duration(idle+waiting) * 10 * time.Millisecond, errors.Join(idleErr, waitingErr)
}

// PeakResident gives the most memory in bytes that a process has had resident.
func PeakResident(pid int) (float64, error) { return procBytes(pid, "VmHWM:") }

// Resident gives a process's resident memory in bytes.
func Resident(pid int) (float64, error) { return procBytes(pid, "VmRSS:") }

func procBytes(pid int, key string) (float64, error) {
	kb, err := procLine(fmt.Sprintf("/proc/%d/status", pid), key)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseFloat(strings.TrimSuffix(kb, " kB"), 64)
	return n * 1024, err
}

func procLine(file, key string) (string, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%w: %w", errNoProc, err)
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(rest), ":")), nil
		}
	}
	return "", errNoProc
}

// ChildWith finds the child of this process with text in its command line.
func ChildWith(text string) (pid int, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		line, err := os.ReadFile(dir + "/cmdline")
		if err != nil || !bytes.Contains(line, []byte(text)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if fields, err := procStat(pid); err == nil && fields[1] == strconv.Itoa(os.Getpid()) {
			return pid, nil
		}
	}
	return 0, errors.New("the process was not found")
}

// Machine describes the machine of this run, a line each.
func Machine() (lines []string) {
	model, err := procLine("/proc/cpuinfo", "model name")
	if err != nil {
		model = runtime.GOARCH
	}
	lines = append(lines, fmt.Sprintf("%d × %s, shared by clients, broker, Vault and PostgreSQL", runtime.NumCPU(), model))
	if total, err := procLine("/proc/meminfo", "MemTotal:"); err == nil {
		kb, _ := strconv.ParseFloat(strings.TrimSuffix(total, " kB"), 64) // a zero is visibly wrong
		lines = append(lines, fmt.Sprintf("%.0f GB of memory", kb/1e6))
	}
	if kernel, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		lines = append(lines, "Linux "+strings.TrimSpace(string(kernel)))
	}
	lines = append(lines, runtime.Version())
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		lines = append(lines, "load of the machine at the start of the run: "+strings.Fields(string(load))[0])
	}
	return lines
}

// GrownBy gives by how many kB a process grew for each of n connections, which it keeps open meanwhile. A first tenth
// is not counted: it fills the buffers that all share.
func GrownBy(pid, n int, open func() (close func(), err error)) (kb float64, err error) {
	var before float64
	for i := range n + n/10 {
		if i == n/10 {
			if before, err = Resident(pid); err != nil {
				return 0, err
			}
		}
		end, err := open()
		if end != nil {
			defer end()
		}
		if err != nil {
			return 0, err
		}
	}
	after, err := Resident(pid)
	return (after - before) / float64(n) / 1000, err
}
