# start.sh zebra|ospfd PROGRAM FOLDER: two routers that speak OSPF, each in a network namespace of its own; the shell
# becomes that daemon of the first one. The other daemons and libfrr.so.0 are beside PROGRAM. Needs root.
set -eu
daemon=$1 builds=$(dirname "$2") folder=$3
if [ "${4:-}" != inside ]; then
    exec unshare --mount --net sh "$0" "$1" "$2" "$3" inside
fi

# The daemons change to the user frr, which this machine need not have.
for file in passwd group; do cp "/etc/$file" "$folder/$file"; done
grep -q '^frr:' "$folder/passwd" || echo 'frr:x:64901:64901::/:/bin/false' >>"$folder/passwd"
grep -q '^frr:' "$folder/group" || echo 'frr:x:64901:' >>"$folder/group"
grep -q '^frrvty:' "$folder/group" || echo 'frrvty:x:64902:frr' >>"$folder/group"
# vtysh asks PAM whether root may use it.
mkdir "$folder/pam.d"
printf 'auth sufficient pam_rootok.so\naccount sufficient pam_rootok.so\n' >"$folder/pam.d/frr"
for file in passwd group pam.d; do mount --bind "$folder/$file" "/etc/$file"; done
mount -t tmpfs tmpfs /run

# 10.1.0.1 - first router - 10.9.0.1 = 10.9.0.2 - second router - 10.2.0.1
unshare --net sleep infinity &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add to-second type veth peer name to-first netns $second
ip link set lo up
ip address add 10.1.0.1/32 dev lo
ip address add 10.9.0.1/24 dev to-second
ip link set to-second up
echo 1 >/proc/sys/net/ipv4/ip_forward
nsenter --target $second --net sh -eu <<END
ip link set lo up
ip address add 10.2.0.1/32 dev lo
ip address add 10.9.0.2/24 dev to-first
ip link set to-first up
for number in \$(seq 1 20); do ip route add 10.4.\$number.0/24 dev lo; done
END

mkdir "$folder/first" "$folder/second"
chown frr:frrvty "$folder/first" "$folder/second"
for router in first second; do
    echo "hostname $router" >"$folder/$router.zebra"
    cat >"$folder/$router.ospfd" <<END
hostname $router
interface to-$([ $router = first ] && echo second || echo first)
 ip ospf network point-to-point
 ip ospf hello-interval 1
 ip ospf dead-interval 40
router ospf
 redistribute kernel
 timers throttle spf 0 50 50
 timers lsa min-arrival 0
 network 10.9.0.0/24 area 0
END
done
echo " network 10.1.0.1/32 area 0" >>"$folder/first.ospfd"
echo " network 10.2.0.1/32 area 0" >>"$folder/second.ospfd"
chown frr:frr "$folder"/*.zebra "$folder"/*.ospfd

export LD_LIBRARY_PATH="$builds"
run() { # ROUTER DAEMON COMMAND...: the command with the options of that daemon
    router=$1 name=$2
    shift 2
    exec "$@" "$builds/$name" -u frr -g frr -A 127.0.0.1 -P 0 -f "$folder/$router.$name" -i "$folder/$router/$name.pid" \
        -z "$folder/$router/zserv.api" --vty_socket "$folder/$router" --log stdout
}
listening() { until [ -S "$1" ]; do sleep 0.05; done; }

run second zebra nsenter --target $second --net &
(listening "$folder/second/zserv.api" && run second ospfd nsenter --target $second --net) &
nsenter --target $second --net python3 client.py serve 10.2.0.1 7000 &
if [ "$daemon" = zebra ]; then
    (listening "$folder/first/zserv.api" && run first ospfd env) &
else
    run first zebra env &
    listening "$folder/first/zserv.api"
fi
run first "$daemon" env
