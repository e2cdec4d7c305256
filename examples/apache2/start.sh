# start.sh PROGRAM PORT FOLDER MODULE: Apache with the folders of its users; the shell becomes the daemon. Needs root.
set -eu
modules=$(dirname "$4")
mkdir -p "$3/site" "$3/home/somebody"
echo of nobody >"$3/home/stray.txt"
echo of somebody >"$3/home/somebody/page.txt"
echo of the site >"$3/site/page.txt"
cat >"$3/httpd.conf" <<END
ServerRoot $3
ServerName localhost
DefaultRuntimeDir $3
PidFile $3/httpd.pid
ErrorLog $3/error.log
Mutex fcntl:$3
LoadModule mpm_event_module $modules/mod_mpm_event.so
LoadModule authz_core_module $modules/mod_authz_core.so
LoadModule mime_module $modules/mod_mime.so
LoadModule userdir_module $4
TypesConfig /dev/null
User daemon
Group daemon
Listen 127.0.0.1:$2
StartServers 2
ThreadsPerChild 16
KeepAliveTimeout 300
MaxKeepAliveRequests 0
DocumentRoot $3/site
UserDir $3/home
<Directory />
    Require all granted
</Directory>
END
exec "$1" -f "$3/httpd.conf" -DFOREGROUND
