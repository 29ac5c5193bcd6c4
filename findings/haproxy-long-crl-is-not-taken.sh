#!/usr/bin/env bash
# HAProxy: a revocation list that is longer than one buffer cannot be set at run time, and no answer names its size.
#
# Installs: haproxy 2.6.12-1+deb12u4, from Debian 12. Uses openssl and python3.
#
# A new list of revoked certificates is given to a running HAProxy by two commands of its stats socket: set ssl crl-file
# with the list as payload, then commit ssl crl-file. A list of 300 certificates (some 14 kB in PEM) is taken.
# With one of 1,000 (47 kB) the answer to set is empty, which a script takes for "nothing went wrong", and the commit that
# follows finds nothing to commit. A payload must fit in tune.bufsize (16,384 bytes by default). HAProxy starts with the
# same list as a file.
#
# Output seen:
#   HAProxy 2.6.12
#   300 entries: set: transaction created for CRL FILE!; commit: Committing FILE. / Success!
#   1000 entries: set: no answer; commit: No ongoing transaction! ! / Can't commit FILE!
#   1000 entries in the file at the start: taken
set -euo pipefail
want=$(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -q haproxy=2.6.12-1+deb12u4 >/dev/null 2>&1
dpkg-deb -x haproxy_*.deb root
haproxy=$dir/root/usr/sbin/haproxy
openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out ca.pem -days 2 -subj /CN=authority 2>/dev/null
cat ca.pem key.pem >server.pem

# list NAME N writes a list of N revoked certificates.
list() {
	printf '%s\n' '[ca]' 'default_ca=c' '[c]' 'database=index' 'default_md=sha256' 'default_crl_days=1' >ca.conf
	: >index.attr
	python3 -c 'for i in range('"$2"'): print("R\t491231235959Z\t200101000000Z\t%032X\tunknown\t/CN=x" % (i + 2**100))' >index
	openssl ca -gencrl -config ca.conf -keyfile key.pem -cert ca.pem -out "$1" 2>/dev/null
}
list none.pem 0
list short.pem 300
list long.pem 1000

# start runs HAProxy with a list.
start() {
	port=$((20000 + RANDOM))
	cp "$1" list.pem
	cat >config <<C
global
    stats socket $dir/stats mode 600 level admin
defaults
    mode http
    timeout client 5s
    timeout connect 5s
    timeout server 5s
frontend f
    bind 127.0.0.1:$port ssl crt $dir/server.pem ca-file $dir/ca.pem crl-file $dir/list.pem verify required
C
	rm -f stats
	"$haproxy" -db -f config >log 2>&1 &
	pid=$!
	for _ in $(seq 100); do
		[ ! -S stats ] || break
		sleep 0.1
	done
}

# say sends one command to the socket, and prints the answer.
say() {
	python3 - "$dir/stats" "$1" "$dir/list.pem" <<'P'
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(10)
s.connect(sys.argv[1])
answer = b""
try:
    s.sendall(sys.argv[2].encode())
    s.shutdown(socket.SHUT_WR)
    while part := s.recv(65536):
        answer += part
except OSError:
    pass
lines = [l.strip() for l in answer.decode().replace(sys.argv[3], "FILE").splitlines() if l.strip()]
print(" / ".join(lines) if lines else "no answer")
P
}

"$haproxy" -v | sed -n 's/^HAProxy version \([0-9.]*\).*/HAProxy \1/p' >got
start none.pem
for n in short:300 long:1000; do
	set=$(say "set ssl crl-file $dir/list.pem <<
$(cat "${n%:*}.pem")

")
	echo "${n#*:} entries: set: $set; commit: $(say "commit ssl crl-file $dir/list.pem
")" >>got
done
kill "$pid"
wait "$pid" 2>/dev/null || true
start long.pem
say "show ssl crl-file $dir/list.pem
" >/dev/null
if kill -0 "$pid" 2>/dev/null; then echo "1000 entries in the file at the start: taken" >>got; fi
cat got
[ "$(cat got)" = "$want" ] || { echo "another output than: $want" >&2; cat log >&2; exit 1; }
