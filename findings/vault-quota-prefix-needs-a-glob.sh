#!/usr/bin/env bash
# A rate quota of Vault on a path inside a mount counts that path alone. Without a star at its end it does not count what is
# below it, while a quota on the mount, also without a star, counts everything below the mount.
#
# Installs: github.com/hashicorp/vault v1.21.0, built from the Go module proxy (ten minutes, 3 GB of downloads and cache).
#
# A platform team bounds logins or mints by a quota: "transit" for the whole engine, "transit/sign" for its signatures. Both
# are accepted and listed. Ten requests to transit/sign/k within a second, under a quota of two:
#
# Output seen:
#   quota on transit/: 2 of 10 answered, 8 refused with 429
#   quota on transit/sign: 10 of 10 answered, 0 refused with 429
#   quota on transit/sign*: 2 of 10 answered, 8 refused with 429
set -euo pipefail
want=$(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir"; rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

var address, token string

// builtins has the one plugin of this server. Vault asks it when an engine is enabled.
type builtins struct{}

func (builtins) Get(string, consts.PluginType) (func() (any, error), bool) {
	return func() (any, error) { return transit.Factory, nil }, true
}
func (builtins) Contains(name string, _ consts.PluginType) bool { return name == "transit" }
func (builtins) Keys(consts.PluginType) []string                { return []string{"transit"} }
func (builtins) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
func (builtins) DeprecationStatus(string, consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, true
}

// send returns the status, and the answer.
func send(method, path string, body any) (int, map[string]any) {
	raw, err := json.Marshal(body)
	check(err)
	req, err := http.NewRequest(method, address+"/v1/"+path, bytes.NewReader(raw))
	check(err)
	req.Header.Set("X-Vault-Token", token)
	resp, err := http.DefaultClient.Do(req)
	check(err)
	defer resp.Body.Close()
	answer := map[string]any{}
	_ = json.NewDecoder(resp.Body).Decode(&answer) // some answers have none
	return resp.StatusCode, answer
}

func must(method, path string, body any) map[string]any {
	status, answer := send(method, path, body)
	if status >= 300 {
		panic(fmt.Sprint(method, " ", path, ": ", status, " ", answer))
	}
	return answer
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	log := hclog.NewNullLogger()
	storage, err := inmem.NewInmem(nil, log)
	check(err)
	core, err := vault.NewCore(&vault.CoreConfig{Physical: storage, Logger: log, DisableMlock: true,
		BuiltinRegistry: builtins{},
		LogicalBackends: map[string]logical.Factory{"transit": transit.Factory}})
	check(err)
	server := httptest.NewServer(vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core,
		ListenerConfig: &configutil.Listener{}}))
	address = server.URL
	made := must("PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	token = made["root_token"].(string)
	must("PUT", "sys/unseal", map[string]any{"key": made["keys"].([]any)[0]})
	must("POST", "sys/mounts/transit", map[string]any{"type": "transit"})
	must("POST", "transit/keys/k", map[string]any{"type": "ed25519"})
	for _, path := range []string{"transit/", "transit/sign", "transit/sign*"} {
		must("POST", "sys/quotas/rate-limit/q", map[string]any{"path": path, "rate": 2, "interval": "1h"})
		answered, refused := 0, 0
		for range 10 {
			switch status, _ := send("PUT", "transit/sign/k", map[string]any{"input": "aGVsbG8="}); status {
			case http.StatusOK:
				answered++
			case http.StatusTooManyRequests:
				refused++
			}
		}
		fmt.Printf("quota on %s: %d of 10 answered, %d refused with 429\n", path, answered, refused)
		must("DELETE", "sys/quotas/rate-limit/q", nil)
	}
}
GO
{
	go mod init example.org/finding
	go get github.com/hashicorp/vault@v1.21.0 github.com/hashicorp/vault/sdk@v0.20.0
	go mod tidy
} >log 2>&1 || { cat log; exit 1; }
got=$(go run .)
echo "$got"
[ "$got" = "$want" ] || { echo "another output than: $want" >&2; exit 1; }
