package report

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// ReadRows reads the rows that [Report.WriteJSON] wrote, also those of an older or newer build.
func ReadRows(file string) ([]Row, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	rows, err := ParseRows(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return rows, nil
}

// ParseRows parses a JSON array of rows. It ignores members that it does not know. It refuses a row without a name, and
// one that is there twice.
func ParseRows(raw []byte) ([]Row, error) {
	var rows []Row
	if err := json.Unmarshal(raw, &rows); err != nil {
		return nil, fmt.Errorf("these are no rows of a measurement: %w", err)
	}
	seen := map[string]bool{}
	for i, w := range rows {
		switch {
		case w.Name == "" || strings.ContainsAny(w.Name, " \t\r\n"):
			return nil, fmt.Errorf("row %d has the name %q; a name has no spaces and is not empty", i+1, w.Name)
		case seen[w.Name]:
			return nil, fmt.Errorf("row %s is there twice", w.Name)
		}
		seen[w.Name] = true
	}
	return rows, nil
}

func find(rows []Row, name string) (w Row, ok bool) {
	for _, w := range rows {
		if w.Name == name {
			return w, true
		}
	}
	return w, false
}
