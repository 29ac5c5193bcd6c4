#!/usr/bin/env bash
# cedar-go's schema validator accepts a comparison of a datetime with a Long, which always fails when it is evaluated.
#
# Installs: github.com/cedar-policy/cedar-go v1.9.0, from the Go module proxy.
#
# A policy author writes `context.at < 5`, where the schema says that `at` is a datetime. "<" takes two numbers, two
# datetimes or two durations, never one of each. The validator (x/exp/schema/validate) refuses a string there, but reports
# no error for this, with its strict rules either. The evaluation ends with a type error, so a permit never applies and a
# forbid never forbids. Whoever validates policies before they are in force should also evaluate each condition once.
#
# Output seen:
#   datetime < datetime: valid; evaluated without an error
#   string < Long: refused
#   datetime < Long: valid; evaluation ends with an error
#   Long < datetime: valid; evaluation ends with an error
set -euo pipefail
want=$(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >main.go <<'GO'
package main

import (
	"fmt"
	"time"

	"github.com/cedar-policy/cedar-go"
	tree "github.com/cedar-policy/cedar-go/x/exp/ast"
	schema "github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
)

func main() {
	user, doc := cedar.NewEntityUID("User", "u"), cedar.NewEntityUID("Doc", "d")
	action := schema.Action{Entity: cedar.Entity{UID: cedar.NewEntityUID("Action", "read")},
		AppliesTo: &schema.AppliesTo{Principals: []cedar.EntityType{"User"}, Resources: []cedar.EntityType{"Doc"},
			Context: schema.RecordType{
				"at":    {Type: schema.ExtensionType("datetime")},
				"text":  {Type: schema.StringType{}},
				"count": {Type: schema.LongType{}}}}}
	strict := validate.New(&schema.Schema{
		Entities: map[cedar.EntityType]schema.Entity{"User": {Name: "User"}, "Doc": {Name: "Doc"}},
		Actions:  map[cedar.EntityUID]schema.Action{action.Entity.UID: action}})
	for _, row := range []struct{ name, condition string }{
		{"datetime < datetime", `context.at < datetime("2030-01-01")`},
		{"string < Long", `context.text < 5`},
		{"datetime < Long", `context.at < 5`},
		{"Long < datetime", `context.count < context.at`},
	} {
		var p cedar.Policy
		if err := p.UnmarshalCedar([]byte(`permit (principal, action, resource) when { ` + row.condition + ` };`)); err != nil {
			panic(err)
		}
		if err := strict.Policy("p", (*tree.Policy)(p.AST())); err != nil {
			fmt.Printf("%s: refused\n", row.name)
			continue
		}
		all := cedar.NewPolicySet()
		all.Add("p", &p)
		_, diagnostic := cedar.Authorize(all, cedar.EntityMap{}, cedar.Request{Principal: user, Action: action.Entity.UID,
			Resource: doc, Context: cedar.NewRecord(cedar.RecordMap{"at": cedar.NewDatetime(time.Unix(0, 0)),
				"text": cedar.String("a"), "count": cedar.Long(1)})})
		end := "evaluated without an error"
		if len(diagnostic.Errors) > 0 {
			end = "evaluation ends with an error"
		}
		fmt.Printf("%s: valid; %s\n", row.name, end)
	}
}
GO
{
	go mod init example.org/finding
	go get github.com/cedar-policy/cedar-go@v1.9.0
	go mod tidy
} >log 2>&1 || { cat log; exit 1; }
got=$(go run .)
echo "$got"
[ "$got" = "$want" ] || { echo "another output than: $want" >&2; exit 1; }
