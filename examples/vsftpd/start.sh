# start.sh PROGRAM PORT FOLDER: vsftpd for anonymous users, who may upload; the shell becomes the daemon. Needs root.
set -eu
mkdir -p "$3/root/uploads" "$3/empty"
chown daemon "$3/root/uploads"
cat >"$3/vsftpd.conf" <<END
listen=YES
listen_ipv6=NO
listen_address=127.0.0.1
listen_port=$2
background=NO
anonymous_enable=YES
no_anon_password=YES
anon_root=$3/root
anon_upload_enable=YES
anon_umask=022
write_enable=YES
ftp_username=daemon
nopriv_user=nobody
secure_chroot_dir=$3/empty
deny_file={secret.txt}
seccomp_sandbox=NO
END
exec "$1" "$3/vsftpd.conf"
