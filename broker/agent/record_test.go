package agent_test

import (
	"net/http"
	"net/http/httptest"
	"reflect"
	"testing"
	"time"

	"github.com/pawlsec/pawl/broker/agent"
	"github.com/pawlsec/pawl/broker/api"
)

// fill sets every field of a wire struct that is zero.
func fill(v reflect.Value) {
	for i := range v.NumField() {
		f := v.Field(i)
		switch {
		case !f.IsZero():
		case f.Type() == reflect.TypeFor[time.Time]():
			f.Set(reflect.ValueOf(time.Date(2030, 1, 2, 3, 4, i, 0, time.UTC)))
		case f.Kind() == reflect.String:
			f.SetString(v.Type().Field(i).Name)
		case f.CanInt():
			f.SetInt(int64(i + 1))
		case f.Kind() == reflect.Bool:
			f.SetBool(true)
		case f.Kind() == reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
		case f.Kind() == reflect.Struct:
			fill(f)
		}
	}
}

// TestRecords: the SDK's types have every member of the broker's records.
func TestRecords(t *testing.T) {
	d := api.Delegation{ID: child, Chain: chain, Parent: root, Fence: &api.Fence{Revocation: revocation}}
	fill(reflect.ValueOf(&d).Elem())
	fill(reflect.ValueOf(d.Fence).Elem())
	g := api.Grant{ID: grant(1), Chain: chain, Delegation: root}
	fill(reflect.ValueOf(&g).Elem())
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			reply(w, 200, api.Standing{Delegation: &d})
			return
		}
		reply(w, 200, g)
	}))
	defer h.Close()
	c, err := agent.New(agent.Config{Address: h.URL, HTTPClient: h.Client()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // nil for a client that New made
	joined, err := c.Join(t.Context(), child)
	if err != nil {
		t.Fatal(err)
	}
	ended, err := c.EndGrant(t.Context(), agent.GrantID(g.ID))
	if err != nil {
		t.Fatal(err)
	}
	info := joined.Info()
	for _, record := range []any{info, *info.Fence, ended} {
		v := reflect.ValueOf(record)
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%T.%s is zero, want the value of the answer", record, v.Type().Field(i).Name)
			}
		}
	}
	for _, pair := range [][2]any{{d, info}, {*d.Fence, *info.Fence}, {g, ended}} {
		if wire, sdk := reflect.TypeOf(pair[0]), reflect.TypeOf(pair[1]); wire.NumField() != sdk.NumField() {
			t.Errorf("%v has %d members and %v %d", wire, wire.NumField(), sdk, sdk.NumField())
		}
	}
}
