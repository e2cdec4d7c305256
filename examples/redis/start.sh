# start.sh PROGRAM PORT FOLDER: redis with a log of all writes, and its replica. The shell stays their parent.
set -eu
ln -s "$1" "$3/redis-server" # it acts by the name that it is called by
mkdir "$3/master" "$3/replica"
"$3/redis-server" --bind 127.0.0.1 --port "$2" --dir "$3/master" --appendonly yes --save '' \
    --enable-debug-command local --repl-diskless-sync-delay 0 &
"$3/redis-server" --port 0 --unixsocket "$3/replica.socket" --dir "$3/replica" --save '' \
    --replicaof 127.0.0.1 "$2" &
wait
