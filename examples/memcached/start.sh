# start.sh PROGRAM PORT FOLDER: memcached with users of its own; the shell becomes the daemon.
set -eu
printf 'alice@example:first\nload@example:secret\nalice@example:second\n' >"$3/users"
printf 'mech_list: plain\n' >"$3/memcached.conf"
exec "$1" -S -l 127.0.0.1 -p "$2" -U 0 -t 4 -u "$(id -un)"
