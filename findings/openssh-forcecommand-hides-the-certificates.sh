#!/usr/bin/env bash
# OpenSSH: with ForceCommand in sshd_config, the forced command of a certificate is not run, and its name is nowhere.
#
# Installs: openssh-server and openssh-client 1:9.2p1-2+deb12u10, from Debian 12.
#
# An authority signs a certificate with the critical option force-command, so that it is good for one command only. On a
# host whose sshd_config has a ForceCommand (a session recorder, say) that command runs instead. SSH_ORIGINAL_COMMAND
# holds the words of the client, not the command of the certificate, so the host's command cannot tell that the
# certificate was for one command. With authorized_keys sshd is strict: a command= there that differs from the
# certificate's refuses the login. Neither sshd_config(5) nor ssh-keygen(1) says which of the two wins.
#
# Output seen:
#   OpenSSH 9.2p1
#   certificate alone: runs the certificate's command; SSH_ORIGINAL_COMMAND is "asked"
#   ForceCommand of the host: runs the host's command; SSH_ORIGINAL_COMMAND is "asked"
#   command= of authorized_keys: refused
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
for key in host authority user; do "$keygen" -q -t ed25519 -N '' -f "$key"; done
"$keygen" -q -s authority -I id -n "$(id -un)" -V +1h \
	-O 'force-command=echo "the certificate'\''s $SSH_ORIGINAL_COMMAND"' user.pub
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd # where sshd of root changes its root to
port=$((20000 + $$ % 20000))

# try runs sshd with further lines in its configuration, and logs in once.
try() {
	printf '%s\n' "Port $port" "ListenAddress 127.0.0.1" "HostKey $dir/host" "PidFile $dir/pid" "StrictModes no" \
		"UsePAM no" "PasswordAuthentication no" "KbdInteractiveAuthentication no" "PermitRootLogin yes" "${@:2}" >config
	"$sshd" -t -f config
	"$sshd" -D -f "$dir/config" -E "$dir/log" &
	pid=$!
	for _ in $(seq 100); do
		(exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
		sleep 0.1
	done
	ran=$("$ssh" -F none -i user -p "$port" -o IdentitiesOnly=yes -o StrictHostKeyChecking=no \
		-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes 127.0.0.1 asked 2>/dev/null) || true
	kill "$pid"
	wait "$pid" 2>/dev/null || true
	pid=
	if [ -z "$ran" ]; then echo "$1: refused"; else
		echo "$1: runs ${ran% *} command; SSH_ORIGINAL_COMMAND is \"${ran##* }\""
	fi
}
"$ssh" -V 2>&1 | sed 's/^OpenSSH_\([^ ]*\).*/OpenSSH \1/' >got
hosts='echo "the host'\''s $SSH_ORIGINAL_COMMAND"'
try 'certificate alone' "TrustedUserCAKeys $dir/authority.pub" >>got
try 'ForceCommand of the host' "TrustedUserCAKeys $dir/authority.pub" "ForceCommand $hosts" >>got
echo "cert-authority,command=\"another\" $(cat authority.pub)" >keys
try 'command= of authorized_keys' "AuthorizedKeysFile $dir/keys" >>got
cat got
[ "$(cat got)" = "$want" ] || { echo "another output than: $want" >&2; cat log >&2; exit 1; }
