package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/pawlsec/pawl/broker/api"
)

// route is one endpoint.
type route struct {
	method, path string
	query        []string // names of the accepted query parameters
	do           endpoint
}

// endpoint answers a request, or returns the error to answer with if nothing has been written.
type endpoint func(*exchange) error

// exchange is one request with its answer and its log attributes.
type exchange struct {
	*http.Request
	w      *recorder
	began  time.Time
	id     string // identifies the request in the log and in a problem
	caller string // the agent or operator; empty: no identity yet
	done   func() // called after the answer; nil: nothing
	events []slog.Attr
}

// note adds attributes to the log line of the request. They must not hold a secret or a body.
func (x *exchange) note(attrs ...slog.Attr) { x.events = append(x.events, attrs...) }

// recorder records the status, and so whether an answer was started.
type recorder struct {
	http.ResponseWriter
	status int
}

func (w *recorder) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach the wrapped writer.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// router matches the method and path of each route exactly, and answers everything else with a problem.
func (s *Server) router(routes []route) http.Handler {
	mux := http.NewServeMux()
	methods := map[string][]string{}
	for _, r := range routes {
		mux.Handle(r.method+" "+r.path, s.serve(r))
		methods[r.path] = append(methods[r.path], r.method)
	}
	for path, allowed := range methods {
		mux.Handle(path, s.serve(route{path: path, do: refuseMethod(allowed)}))
	}
	nowhere := s.serve(route{path: "none", do: func(*exchange) error {
		return api.NewProblem(api.KindNotFound, api.CodeNoEndpoint, "")
	}})
	mux.Handle("/", nowhere)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The mux would redirect a path that is not clean, and unescape a path before it matches.
		if r.URL.RawPath != "" || path.Clean(r.URL.Path) != r.URL.Path {
			nowhere.ServeHTTP(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func refuseMethod(allowed []string) endpoint {
	slices.Sort(allowed)
	return func(x *exchange) error {
		x.w.Header().Set("Allow", strings.Join(allowed, ", "))
		return api.NewProblem(api.KindMalformed, api.CodeMethod, "")
	}
}

// serve runs one endpoint with the steps that every request has in common.
func (s *Server) serve(r route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		start := s.cfg.Now()
		x := &exchange{Request: req, w: &recorder{ResponseWriter: w}, began: start, id: rand.Text()}
		x.w.Header().Set("Cache-Control", "no-store")
		x.w.Header().Set("X-Content-Type-Options", "nosniff")
		defer func() {
			if x.done != nil {
				x.done()
			}
		}()
		err := caught(func() error { return s.run(r, x) })
		if errors.Is(err, http.ErrAbortHandler) {
			panic(http.ErrAbortHandler) // net/http closes the connection
		}
		if err != nil && x.w.status == 0 {
			s.refuse(x, err)
		}
		s.log(r, x, err, s.cfg.Now().Sub(start))
	})
}

// caught turns a panic in one request into an error of that request, so that no request can harm another.
func caught(f func() error) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case runtime.Error:
			err = fmt.Errorf("panic: %w\n%s", p, debug.Stack())
		case error:
			err = p // http.ErrAbortHandler; the text of others may hold data that must not be logged
			if !errors.Is(p, http.ErrAbortHandler) {
				err = fmt.Errorf("panic: %T\n%s", p, debug.Stack())
			}
		default:
			err = fmt.Errorf("panic: %T\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// run checks the request line and calls the endpoint.
func (s *Server) run(r route, x *exchange) error {
	// GET routes match HEAD too. An endless answer without a body is of no use.
	if r.method != "" && x.Method != r.method {
		return refuseMethod([]string{r.method})(x)
	}
	if err := checkQuery(x.URL, r.query); r.method != "" && err != nil {
		return err
	}
	return r.do(x)
}

// checkQuery refuses parameters that the endpoint does not know: a misspelt limit must not count as no limit.
func checkQuery(u *url.URL, known []string) error {
	values, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return malformed("the query is malformed")
	}
	for name, given := range values {
		if !slices.Contains(known, name) {
			return malformed("unknown query parameter %.40q", name)
		}
		if len(given) != 1 {
			return malformed("query parameter %q is given twice", name)
		}
	}
	return nil
}

func (s *Server) log(r route, x *exchange, err error, took time.Duration) {
	level, attrs := slog.LevelInfo, []slog.Attr{
		slog.String("request", x.id), slog.String("method", x.Method), slog.String("path", r.path),
		slog.Int("status", x.w.status), slog.Duration("took", took),
	}
	if err != nil {
		p := problemOf(err)
		attrs = append(attrs, slog.String("code", string(p.Code)))
		switch p.Kind {
		case api.KindInternal:
			level = slog.LevelError
		case api.KindUnavailable:
			level = slog.LevelWarn
		}
		if len(p.Policies) > 0 {
			attrs = append(attrs, slog.Any("policies", p.Policies))
		}
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	line := func() {
		s.cfg.Log.LogAttrs(x.Context(), level, "request", append(attrs, x.events...)...)
	}
	if err != nil && problemOf(err).Kind == api.KindOverLimit { // a flood would fill the log
		s.limitLog.Do(line)
		return
	}
	line()
}
