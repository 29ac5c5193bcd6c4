package server_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/pawlsec/pawl/broker/server"
)

// TestApart holds that a panic beside a request becomes its error, without the text, and ends no process.
func TestApart(t *testing.T) {
	failed := errors.New("failed")
	for name, row := range map[string]struct {
		f    func() error
		want string
	}{
		"a result":   {func() error { return nil }, ""},
		"an error":   {func() error { return failed }, "failed"},
		"a panic":    {func() error { panic("a text with a marker") }, "panic: string"},
		"a nil read": {func() error { return *(*error)(nil) }, "nil pointer"},
	} {
		err := server.Apart(row.f)
		if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
			t.Errorf("%s: apart = %v, want %q", name, err, row.want)
		}
		if err != nil && strings.Contains(err.Error(), "marker") {
			t.Errorf("%s: the error has the text of the panic: %v", name, err)
		}
	}
}
