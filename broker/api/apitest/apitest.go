// Package apitest compares the answers of a running broker with the OpenAPI document, in tests.
package apitest

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/pawlsec/pawl/broker/api"
)

// Document is the OpenAPI document, ready to check answers. It is safe for concurrent use.
type Document struct {
	doc      any
	compiler *jsonschema.Compiler
	mux      *http.ServeMux // finds the path of the document that a request has

	mu      sync.Mutex // guards the fields below, and the compiler
	schemas map[string]*jsonschema.Schema
	seen    map[string]bool
	notify  func(answer string)
}

// where is the name of the document for its schemas.
const where = "openapi.json"

// Read reads the document that the broker serves.
func Read() (*Document, error) {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(api.OpenAPI))
	if err != nil {
		return nil, err
	}
	d := &Document{doc: doc, compiler: jsonschema.NewCompiler(), mux: http.NewServeMux(),
		schemas: map[string]*jsonschema.Schema{}, seen: map[string]bool{}}
	d.compiler.DefaultDraft(jsonschema.Draft2020) // the dialect of OpenAPI 3.1
	d.compiler.AssertFormat()
	if err := d.compiler.AddResource(where, doc); err != nil {
		return nil, err
	}
	paths, _ := at(doc, "paths").(map[string]any)
	for path := range paths {
		d.mux.Handle(path, http.NotFoundHandler())
	}
	return d, nil
}

// See counts an answer of the document as seen, such as "get /v1/chains 200" or "get /v1/chains default".
func (d *Document) See(answer string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.seen[answer] && d.notify != nil {
		d.notify(answer)
	}
	d.seen[answer] = true
}

// Notify calls f once for each answer that is seen from now on, for another process that must know.
func (d *Document) Notify(f func(answer string)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notify = f
}

// Unseen lists the answers of the document that no exchange had: each status of each operation. "default" are its
// refusals.
func (d *Document) Unseen() (list []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	paths, _ := at(d.doc, "paths").(map[string]any)
	for path, item := range paths {
		for method, operation := range item.(map[string]any) {
			responses, _ := at(operation, "responses").(map[string]any)
			for status := range responses {
				if answer := method + " " + path + " " + status; !d.seen[answer] {
					list = append(list, answer)
				}
			}
		}
	}
	slices.Sort(list)
	return list
}

// Exchange is a request and its answer.
type Exchange struct {
	Method string
	URL    *url.URL
	Asked  []byte // the request's body
	Status int
	Header http.Header
	Answer []byte
}

// Check compares an exchange with the document.
func (d *Document) Check(x Exchange) error {
	_, path := d.mux.Handler(&http.Request{Method: x.Method, URL: x.URL, Host: "pawl"})
	method := strings.ToLower(x.Method)
	operation, _ := at(d.doc, "paths", path, method).(map[string]any)
	pointer := pointerTo("paths", path, method)
	refused := x.Status >= 400
	if operation == nil {
		if !refused {
			return fmt.Errorf("%s %s is not in the document, and answers %d", x.Method, x.URL.Path, x.Status)
		}
		return d.body(x, at(d.doc, "paths", "/healthz", "get", "responses", "default"),
			pointerTo("paths", "/healthz", "get", "responses", "default"))
	}
	status := strconv.Itoa(x.Status)
	response := at(operation, "responses", status)
	if response == nil {
		if status = "default"; !refused {
			return fmt.Errorf("%s %s answers %d, which is not in the document", x.Method, path, x.Status)
		}
		response = at(operation, "responses", status)
	}
	d.See(method + " " + path + " " + status)
	if err := d.body(x, response, pointer+pointerTo("responses", status)); err != nil {
		return fmt.Errorf("%s %s answers %d: %w", x.Method, path, x.Status, err)
	}
	if refused {
		return nil
	}
	if err := d.asked(x, path, operation, pointer); err != nil {
		return fmt.Errorf("%s %s took a request: %w", x.Method, path, err)
	}
	return nil
}

// body compares the body of an answer with a response of the document.
func (d *Document) body(x Exchange, response any, pointer string) error {
	content, _ := at(response, "content").(map[string]any)
	given := x.Header.Get("Content-Type")
	if x.Method == http.MethodHead {
		return nil // net/http leaves out the body
	}
	if len(content) == 0 {
		if len(x.Answer) > 0 {
			return fmt.Errorf("a body of %d bytes, %s; the document has none", len(x.Answer), given)
		}
		return nil
	}
	media := ""
	for name := range content {
		if sameType(name, given) {
			media = name
		}
	}
	if media == "" {
		return fmt.Errorf("Content-Type %q; the document has %q", given, slices.Collect(keys(content)))
	}
	at := pointer + pointerTo("content", media, "schema")
	switch {
	case media == "text/event-stream":
		return d.events(x.Answer)
	case strings.HasSuffix(media, "json"):
		return d.json(x.Answer, at)
	}
	return d.value(string(x.Answer), at)
}

func keys(m map[string]any) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// sameType compares media types; a parameter counts where the document has it.
func sameType(documented, given string) bool {
	want, params, err := mime.ParseMediaType(documented)
	if err != nil {
		return false
	}
	got, has, err := mime.ParseMediaType(given)
	for name, value := range params {
		if !strings.EqualFold(has[name], value) {
			return false
		}
	}
	return err == nil && want == got
}

// events compares each event of a stream with the schema of its name. The last one may have been cut off.
func (d *Document) events(stream []byte) error {
	blocks := strings.Split(string(stream), "\n\n")
	for _, block := range blocks[:len(blocks)-1] {
		var name, data string
		for line := range strings.Lines(block) {
			line = strings.TrimSuffix(line, "\n")
			if text, ok := strings.CutPrefix(line, "event: "); ok {
				name = text
			}
			if text, ok := strings.CutPrefix(line, "data: "); ok {
				data += text
			}
		}
		if data == "" {
			continue // a comment
		}
		schema := map[string]string{api.EventStanding: "Standing", api.EventRevocation: "Revocation", api.EventProblem: "Problem"}[name]
		if schema == "" {
			return fmt.Errorf("an event %q, which is not in the document", name)
		}
		if err := d.json([]byte(data), pointerTo("components", "schemas", schema)); err != nil {
			return fmt.Errorf("event %q: %w", name, err)
		}
	}
	return nil
}

// asked compares the query and the body of a request that was taken with its operation.
func (d *Document) asked(x Exchange, path string, operation map[string]any, pointer string) error {
	parameters, _ := operation["parameters"].([]any)
	for name, values := range x.URL.Query() {
		i := slices.IndexFunc(parameters, func(p any) bool { return at(p, "name") == name && at(p, "in") == "query" })
		if i < 0 {
			return fmt.Errorf("query parameter %q is not in the document", name)
		}
		if err := d.text(values[0], pointer+pointerTo("parameters", strconv.Itoa(i), "schema")); err != nil {
			return fmt.Errorf("query parameter %q: %w", name, err)
		}
	}
	if err := d.placed(x.URL.Path, path, parameters, pointer); err != nil {
		return err
	}
	content, _ := at(operation, "requestBody", "content").(map[string]any)
	if content["application/json"] == nil {
		return nil
	}
	return d.json(x.Asked, pointer+pointerTo("requestBody", "content", "application/json", "schema"))
}

// placed compares the parameters in a path with the operation.
func (d *Document) placed(given, path string, parameters []any, pointer string) error {
	values := strings.Split(given, "/")
	for n, segment := range strings.Split(path, "/") {
		name, ok := strings.CutPrefix(segment, "{")
		if !ok {
			continue
		}
		name = strings.TrimSuffix(name, "}")
		i := slices.IndexFunc(parameters, func(p any) bool { return at(p, "name") == name && at(p, "in") == "path" })
		if i < 0 {
			return fmt.Errorf("path parameter %q is not in the document", name)
		}
		if err := d.value(values[n], pointer+pointerTo("parameters", strconv.Itoa(i), "schema")); err != nil {
			return fmt.Errorf("path parameter %q: %w", name, err)
		}
	}
	return nil
}

// text compares a parameter with its schema: as a number or a truth value, or else as text.
func (d *Document) text(text, pointer string) error {
	var v any = text
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		v = n
	} else if b, err := strconv.ParseBool(text); err == nil {
		v = b
	}
	return d.value(v, pointer)
}

func (d *Document) json(text []byte, pointer string) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("%w in %.200q", err, text)
	}
	return d.value(v, pointer)
}

func (d *Document) value(v any, pointer string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.schemas[pointer]
	if s == nil {
		var err error
		if s, err = d.compiler.Compile(where + "#" + pointer); err != nil {
			return fmt.Errorf("compiling the schema: %w", err)
		}
		d.schemas[pointer] = s
	}
	return s.Validate(v)
}

// at returns a part of the document; nil: it has none.
func at(v any, path ...string) any {
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	return v
}

// pointerTo is the JSON pointer of a path, escaped for a fragment.
func pointerTo(path ...string) (p string) {
	escape := strings.NewReplacer("~", "~0", "/", "~1")
	for _, name := range path {
		p += "/" + strings.ReplaceAll(url.PathEscape(escape.Replace(name)), "%7E", "~")
	}
	return p
}

// Wrap returns a function that wraps the handlers of a broker. It gives report each fault of the document.
func (d *Document) Wrap(report func(error)) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var asked bytes.Buffer
			ctx, url := r.Context(), *r.URL
			r.Body = teeBody{io.TeeReader(r.Body, &asked), r.Body}
			rec := &recorder{ResponseWriter: w}
			next.ServeHTTP(rec, r) // a panic is an answer that was cut off
			if rec.broken || rec.status == 0 && ctx.Err() != nil {
				return // the client was gone
			}
			if rec.status == 0 {
				rec.status = http.StatusOK
			}
			if err := d.Check(Exchange{r.Method, &url, asked.Bytes(), rec.status, w.Header(), rec.body.Bytes()}); err != nil {
				report(err)
			}
		})
	}
}

// For is Wrap for a test: a fault of the document fails the test, until the test has ended.
func (d *Document) For(t testing.TB) func(http.Handler) http.Handler {
	t.Helper()
	var mu sync.Mutex
	ended := false // requests that a test leaves behind are not its own any more
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		ended = true
	})
	return d.Wrap(func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if !ended {
			t.Errorf("the OpenAPI document is wrong: %v", err)
		}
	})
}

// Main runs the tests of a package in which the document's every answer must be seen, and returns the exit code. It
// does not ask for them where only some tests run.
func (d *Document) Main(m *testing.M) int {
	code := m.Run()
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != "" {
			return code
		}
	}
	if unseen := d.Unseen(); len(unseen) > 0 && code == 0 {
		fmt.Printf("no test of this package saw these answers of the OpenAPI document:\n\t%s\nFAIL\n", strings.Join(unseen, "\n\t"))
		return 1
	}
	return code
}

type teeBody struct {
	io.Reader
	io.Closer
}

// recorder copies an answer.
type recorder struct {
	http.ResponseWriter
	status int
	broken bool // the client was gone
	body   bytes.Buffer
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
	n, err := w.ResponseWriter.Write(b)
	w.body.Write(b[:n])
	w.broken = w.broken || err != nil
	return n, err
}

// Unwrap lets http.ResponseController reach the wrapped writer.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }
