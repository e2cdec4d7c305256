# start.sh PROGRAM PORT FOLDER: sshd for a user called visitor, who has a key and two certificates; the shell becomes
# the daemon. Needs root. The user database and /run are others in its mount namespace: nothing of the machine is changed.
set -eu
mkdir "$3/home"
chown 61234:61234 "$3/home"
cat >"$3/passwd" <<END
root:*:0:0::/:/bin/sh
sshd:*:65533:65534::/run/sshd:/bin/false
visitor:*:61234:61234::$3/home:/bin/sh
END
for key in host user right comma; do
    ssh-keygen -q -t ed25519 -N '' -f "$3/$key"
done
python3 certify.py "$3/right" visitor
python3 certify.py "$3/comma" nobody,visitor
{
    cat "$3/user.pub"
    echo "cert-authority,principals=\"visitor,somebody\" $(cat "$3/authority.pub")"
} >"$3/authorized"
echo "[127.0.0.1]:$2 $(cat "$3/host.pub")" >"$3/known"
cat >"$3/sshd_config" <<END
ListenAddress 127.0.0.1
Port $2
HostKey $3/host
AuthorizedKeysFile $3/authorized
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
Subsystem sftp internal-sftp
END
exec unshare --mount --propagation private sh -euc '
mount --bind "$2/passwd" /etc/passwd
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
exec "$1" -r -D -e -f "$2/sshd_config"
' sh "$1" "$3"
