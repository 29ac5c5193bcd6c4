package wire

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/pawlsec/pawl/broker"
)

// checkVaultNames checks the names of mounts and roles in Vault. An empty one has its default.
func checkVaultNames(of string, names map[string]string) error {
	var wrong []error
	for _, field := range slices.Sorted(maps.Keys(names)) {
		if names[field] == "" {
			continue
		}
		if err := broker.CheckVaultName(names[field]); err != nil {
			wrong = append(wrong, fmt.Errorf("%s%s: %w", of, field, err))
		}
	}
	return errors.Join(wrong...)
}
