# start.sh POSTGRES FOLDER [OPTION...]: a server with a new cluster and these options, its socket in FOLDER/server; the
# shell becomes the postmaster. It does not run as root: started by root, it belongs to nobody.
set -eu
postgres=$1 folder=$2/server
shift 2
mkdir "$folder"
as=
if [ "$(id -u)" = 0 ]; then
    chown nobody "$folder"
    as="setpriv --reuid=nobody --regid=nogroup --clear-groups"
fi
$as "$(dirname "$postgres")/initdb" --auth=trust --username=postgres --no-sync --no-locale -D "$folder/cluster"
# "closed" is a schema in which "guest" may create nothing.
$as "$postgres" --single -D "$folder/cluster" postgres <<END
create role guest login
create schema guest authorization guest
create schema closed
grant usage on schema closed to guest
END
exec $as "$postgres" -D "$folder/cluster" -h '' -k "$folder" -F -c shared_buffers=16MB -c autovacuum_naptime=1s "$@"
