#!/usr/bin/env bash
# OpenSSH: RevokedKeys none in a Match block is a file named "none", and every key is refused.
#
# Installs: openssh-server and openssh-client 1:9.2p1-2+deb12u10, from Debian 12.
#
# sshd_config(5) says that RevokedKeys takes a file, or none for no file. Outside of Match blocks that is so. Inside one,
# none is kept as a name: sshd fails to open a file of that name when a key is offered, and treats every key as revoked.
# So a host cannot switch its revocation list off for some users or addresses with none. `sshd -t` accepts both files,
# and `sshd -T -C` prints the same line for both, so neither shows the difference.
#
# Output seen:
#   OpenSSH 9.2p1
#   outside of Match: sshd -T says none; the key is accepted
#   in a Match block: sshd -T says none; the key is refused
set -euo pipefail
want=$(sed -n '/^# Output seen:/,/^set/s/^#   //p' "$0")
dir=$(mktemp -d)
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir"
version=1:9.2p1-2+deb12u10
apt-get download -q "openssh-server=$version" "openssh-client=$version" >/dev/null 2>&1
for package in openssh-*.deb; do dpkg-deb -x "$package" root; done
sshd=$dir/root/usr/sbin/sshd ssh=$dir/root/usr/bin/ssh keygen=$dir/root/usr/bin/ssh-keygen
"$keygen" -q -t ed25519 -N '' -f host
"$keygen" -q -t ed25519 -N '' -f user
cp user.pub keys
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd # where sshd of root changes its root to
port=$((20000 + $$ % 20000))

# try runs sshd with further lines in its configuration, and logs in once.
try() {
	printf '%s\n' "Port $port" "ListenAddress 127.0.0.1" "HostKey $dir/host" "PidFile $dir/pid" \
		"AuthorizedKeysFile $dir/keys" "StrictModes no" "UsePAM no" "PasswordAuthentication no" \
		"KbdInteractiveAuthentication no" "PermitRootLogin yes" "ForceCommand echo in" "${@:2}" >config
	"$sshd" -t -f config
	said=$("$sshd" -T -f config -C user="$(id -un)",host=localhost,addr=127.0.0.1 | sed -n 's/^revokedkeys //p')
	"$sshd" -D -f "$dir/config" -E "$dir/log" &
	pid=$!
	for _ in $(seq 100); do
		(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
		sleep 0.1
	done
	answer=refused
	[ "$("$ssh" -F none -i user -p "$port" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
		-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes 127.0.0.1 2>/dev/null)" != in ] || answer=accepted
	kill "$pid"
	wait "$pid" 2>/dev/null || true
	pid=
	echo "$1: sshd -T says $said; the key is $answer"
}
"$ssh" -V 2>&1 | sed 's/^OpenSSH_\([^ ]*\).*/OpenSSH \1/' >got
try 'outside of Match' 'RevokedKeys none' >>got
try 'in a Match block' 'Match Address 127.0.0.0/8' 'RevokedKeys none' >>got
cat got
[ "$(cat got)" = "$want" ] || { echo "another output than: $want" >&2; cat log >&2; exit 1; }
