"""The libraries that every process has: the C library and OpenSSL's, patched under threads that use them.

What livegraft does in a process must not lean on what it patches there: its stub lies behind the text of some image,
and system calls are made by instructions of its own. So the C library's own mmap, memfd_create and dl_iterate_phdr are
exchanged, too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elfdiff.diff import Options, diff
from elfdiff.errors import Refused
from elfdiff.patchobject import PatchObject
from fixtures.debian import Unpacked
from fixtures.intact import altered_code, writable_and_executable
from fixtures.reencoded import reencoded
from patcher.pausing.conditions import Conditions
from patcher.transactions.inspection import inspect_process
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import MAIN, PRELUDE, Running, named, patch_for

pytestmark = [pytest.mark.apt, pytest.mark.root, pytest.mark.slow]

Fetch = Callable[[str, str], Unpacked]

FOLDER = "lib/x86_64-linux-gnu"
LIBC_OLD, LIBC_NEW = "2.36-9+deb12u7", "2.36-9+deb12u14"
SSL = ("3.0.17-1~deb12u2", "3.0.20-1~deb12u2", "3.0.22-1~deb12u2")
PATIENT = Conditions(timeout=120)

CHANGED = (
    "mmap", "munmap", "mprotect", "mremap", "madvise", "memfd_create", "close", "open", "write", "fcntl", "prctl",
    "syscall", "dl_iterate_phdr", "malloc", "free", "calloc", "realloc", "snprintf", "vsnprintf", "strtol", "fork",
)  # fmt: skip
GETPID_NOW = {"getppid": (b"\xb8\x6e\0\0\0", b"\xb8\x27\0\0\0")}
"""``mov eax, SYS_getppid`` becomes ``mov eax, SYS_getpid``: what can be seen of the new build."""

USES = """
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unwind.h>
enum { WORKERS = 4 };
static volatile long rounds[WORKERS], wrong, frames;

static _Unwind_Reason_Code count(struct _Unwind_Context *context, void *data) {
    frames += _Unwind_GetIP(context) != 0;
    return _URC_NO_REASON;
}
static void use(long n) {
    char text[32];
    char *memory = malloc(n % 5000 + 1), *page;
    snprintf(text, sizeof text, "%ld", n);
    memory[0] = 1;
    memory = realloc(memory, n % 9000 + 1);
    page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (strtol(text, NULL, 10) != n || memory[0] != 1 || page == MAP_FAILED || (page[5000] = 7, munmap(page, 8192)))
        wrong++;
    errno = 0;
    if (write(-1, text, 1) != -1 || errno != EBADF)
        wrong++;
    free(memory);
}
static void *work(void *mine) {
    for (long n = 0;; n++) {
        struct timespec moment = {0, 200000};
        use(n);
        ++*(volatile long *)mine;
        nanosleep(&moment, NULL);
    }
}
static __attribute__((constructor)) void begin(void) {
    pthread_t thread;
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&thread, NULL, work, (void *)&rounds[i]))
            abort();
}
long answer(long n) {
    if (n == 0)
        return getppid() == getpid();
    for (int i = 0; i < WORKERS; i++)
        for (long before = rounds[i]; rounds[i] < before + 2;)
            usleep(200);
    frames = 0;
    _Unwind_Backtrace(count, NULL);
    return wrong || frames < 2;
}
"""


@pytest.fixture(scope="module")
def libc(package_version: Fetch) -> Path:
    """The folder of the C library that the archive serves, with its dynamic linker."""
    return package_version("libc6", LIBC_NEW).root / FOLDER


@pytest.fixture(scope="module")
def libc_patch(libc: Path, tmp_path_factory: pytest.TempPathFactory) -> PatchObject:
    new = tmp_path_factory.mktemp("libc") / "libc.so.6"
    reencoded(libc / new.name, new, CHANGED, GETPID_NOW)
    return patch_for(libc / new.name, new, new.parent)


@pytest.fixture
def process(libc: Path, cache_folder: Path) -> Iterator[Running]:
    """A program whose threads use what is changed, started by the dynamic linker of the folder."""
    program = Compiler(cache_folder / "compiled")(
        {"main.c": PRELUDE + MAIN, "answer.c": PRELUDE + USES}, "-pthread", "-Wl,--no-as-needed", "-lgcc_s"
    )
    with Running([libc / "ld-linux-x86-64.so.2", "--library-path", libc, program]) as running:
        yield running


def test_the_c_library_is_exchanged_under_its_users(libc_patch: PatchObject, process: Running, either: str) -> None:
    assert len(libc_patch.functions) == len(CHANGED) + 1
    assert process.ask(0, 1) == [0, 0]
    for _ in range(3):
        apply(process.pid, libc_patch, PATIENT)
        assert process.ask(0, 1) == [1, 0]
        assert writable_and_executable(process.pid) == []
        revert(process.pid, conditions=PATIENT)
        assert process.ask(0, 1) == [0, 0]
        assert altered_code(process.pid) == []


def test_another_library_is_patched_while_the_c_library_is(
    libc_patch: PatchObject, libc: Path, cache_folder: Path, tmp_path: Path
) -> None:
    """What prepares the second patch in the process runs in the new C library, and both are a set in the end."""
    compiled = Compiler(cache_folder / "compiled")
    text = "SEPARATE long twice(long n) { return n * 2 EDIT; }\nlong added(long n) { return twice(n) + 1; }"
    builds = [
        compiled({"added.c": PRELUDE + text.replace("EDIT", edit)}, "-Wl,-soname,libadded.so", link="library")
        for edit in ("", "+ 40")
    ]
    old, new = (named(built, "libadded.so") for built in builds)
    main = PRELUDE + MAIN + "long added(long n);\nlong answer(long n) { return n ? added(n) : getppid() == getpid(); }"
    program = compiled({"main.c": main}, str(old), "-Wl,--no-as-needed", "-lgcc_s")
    patch = patch_for(old, new, tmp_path)
    with Running([libc / "ld-linux-x86-64.so.2", "--library-path", f"{libc}:{old.parent}", program]) as process:
        apply(process.pid, libc_patch, PATIENT)
        assert process.ask(0, 1) == [1, 3]
        apply(process.pid, (patch, libc_patch), PATIENT)
        assert process.ask(0, 1) == [1, 43]
        assert len(revert(process.pid, conditions=PATIENT).members) == 2
        assert process.ask(0, 1) == [0, 3] and altered_code(process.pid) == []


REFUSED = [
    ("libc6", (LIBC_OLD, LIBC_NEW), "lib/x86_64-linux-gnu/libc.so.6", {"struct-layout", "constructors"}),
    ("libssl3", SSL[:2], "usr/lib/x86_64-linux-gnu/libcrypto.so.3", {"initial-value", "kept-function"}),
    ("libssl3", SSL[1:], "usr/lib/x86_64-linux-gnu/libcrypto.so.3", {"kept-function"}),
    ("libssl3", SSL[1:], "usr/lib/x86_64-linux-gnu/libssl.so.3", {"struct-layout", "allocation-size"}),
]


def _named(value: str | tuple[str, ...] | set[str]) -> str:
    """The same in every process: sets have no order, and tests that are shared out are known by their names."""
    return Path(value).name if isinstance(value, str) else ",".join(sorted(value))


@pytest.mark.parametrize(("package", "versions", "path", "codes"), REFUSED, ids=_named)
def test_updates_that_are_refused_say_for_what(
    package: str, versions: tuple[str, str], path: str, codes: set[str], package_version: Fetch
) -> None:
    old, new = (package_version(package, version).file(path) for version in versions)
    with pytest.raises(Refused) as caught:
        diff(old, new, Options())
    assert {finding.code for finding in caught.value.findings} == codes
    assert all(finding.where for finding in caught.value.findings)


HANDSHAKES = """
#include <dlfcn.h>
#include <pthread.h>
enum { WORKERS = 3 };
static volatile long rounds[WORKERS], wrong;
#define SSL_FUNCTIONS(F) \\
    F(void *, TLS_method, (void)) F(void *, SSL_CTX_new, (void *)) F(void *, SSL_new, (void *)) \\
    F(void, SSL_free, (void *)) F(void, SSL_set_connect_state, (void *)) F(void, SSL_set_accept_state, (void *)) \\
    F(void, SSL_set_bio, (void *, void *, void *)) F(int, SSL_do_handshake, (void *)) \\
    F(int, SSL_write, (void *, const void *, int)) F(int, SSL_read, (void *, void *, int)) \\
    F(int, SSL_CTX_use_certificate_chain_file, (void *, const char *)) \\
    F(int, SSL_CTX_use_PrivateKey_file, (void *, const char *, int)) \\
    F(int, BIO_new_bio_pair, (void **, size_t, void **, size_t)) F(const char *, OpenSSL_version, (int))
#define DECLARE(type, name, arguments) static type (*name) arguments;
#define FIND(type, name, arguments) name = dlsym(ssl, #name);
SSL_FUNCTIONS(DECLARE)
static void *context;
struct session { void *client, *server; };

static struct session open_session(void) {
    struct session made = {SSL_new(context), SSL_new(context)};
    void *near, *far;
    BIO_new_bio_pair(&near, 1 << 17, &far, 1 << 17);
    SSL_set_bio(made.client, near, near);
    SSL_set_bio(made.server, far, far);
    SSL_set_connect_state(made.client);
    SSL_set_accept_state(made.server);
    for (int i = 0; i < 10; i++)
        SSL_do_handshake(made.client), SSL_do_handshake(made.server);
    return made;
}
static int talk(struct session one, long n) {
    char text[32], heard[32] = "";
    snprintf(text, sizeof text, "%ld", n);
    return SSL_write(one.client, text, sizeof text) == sizeof text
        && SSL_read(one.server, heard, sizeof heard) == sizeof text && !strcmp(text, heard);
}
static void *work(void *mine) {
    struct session kept = open_session(); /* open across all patches */
    for (long n = 1;; n++) {
        struct session fresh = open_session();
        if (!talk(fresh, n) || !talk(kept, n))
            wrong++;
        SSL_free(fresh.client), SSL_free(fresh.server);
        ++*(volatile long *)mine;
        usleep(500);
    }
}
static __attribute__((constructor)) void begin(void) {
    pthread_t thread;
    void *ssl = dlopen("libssl.so.3", RTLD_NOW | RTLD_GLOBAL);
    if (!ssl)
        abort();
    SSL_FUNCTIONS(FIND)
    context = SSL_CTX_new(TLS_method());
    if (SSL_CTX_use_certificate_chain_file(context, getenv("PEM")) != 1
        || SSL_CTX_use_PrivateKey_file(context, getenv("PEM"), 1) != 1)
        abort();
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&thread, NULL, work, (void *)&rounds[i]))
            abort();
}
long answer(long n) {
    for (int i = 0; i < WORKERS; i++)
        for (long before = rounds[i]; rounds[i] < before + 2;)
            usleep(500);
    return n ? wrong : strstr(OpenSSL_version(0), "3.0.17") != NULL;
}
"""


def test_libssl_is_updated_under_handshakes(
    package_version: Fetch, cache_folder: Path, tmp_path: Path, either: str
) -> None:
    """Opened at run time, by threads that open sessions all the time and use one that was opened before."""
    old, new = (package_version("libssl3", version).root / "usr" / FOLDER for version in SSL[:2])
    patch = patch_for(old / "libssl.so.3", new / "libssl.so.3", tmp_path)
    assert len(patch.functions) > 10
    pem = tmp_path / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", pem, "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem.write_text(pem.read_text() + (tmp_path / "certificate").read_text())
    sources = {"main.c": PRELUDE + MAIN, "answer.c": PRELUDE + HANDSHAKES}
    program = Compiler(cache_folder / "compiled")(sources, "-pthread", "-ldl")
    with Running([program], {"LD_LIBRARY_PATH": str(old), "PEM": str(pem)}) as process:
        assert process.ask(0, 1) == [1, 0]
        for _ in range(2):
            apply(process.pid, patch, PATIENT)
            assert process.ask(1) == [0]
            (carried,) = inspect_process(process.pid).patches
            assert carried.redirected == carried.entries > 0
            revert(process.pid, conditions=PATIENT)
            assert process.ask(1) == [0]
            assert altered_code(process.pid) == []
