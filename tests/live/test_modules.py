"""What is read of a process from outside is what it says of itself."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elfdiff.errors import BadInput, LivegraftError, Refused
from fixtures.hearing import next_line
from patcher.process.memory import Memory
from patcher.process.modules import Module, build_id_in_notes, find_module, modules
from patcher.process.proc import mapping_over, mappings, stack_limit, start_brk, status, thread_ids
from patcher.process.scope import Scope, resolve, search_scope

pytestmark = pytest.mark.root

# Prints where the dynamic linker found each name on its command line, then waits for the end of its input.
PROGRAM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int (*canonical)(const char *) = puts;

int main(int argc, char **argv)
{
	if (getenv("PLUGIN") && !dlopen(getenv("PLUGIN"), RTLD_NOW | RTLD_LOCAL))
		return 1;
	for (int i = 1; i < argc; i++)
		printf("%p\n", dlsym(RTLD_DEFAULT, argv[i]));
	printf("%p %p\n", sbrk(0), (void *)main);
	fflush(stdout);
	return getchar() == 'x';
}
"""
INTERPOSER = "int getppid(void) { return 42; }\nint only_here(void) { return 7; }\n__thread int threads_own;\n"


@contextmanager
def running(program: Path, *names: str, **environment: str) -> Iterator[tuple[int, list[int], int, int]]:
    """The pid, the addresses of the names as the program sees them, its break and the address of main."""
    command = [program, *names]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        lines = [next_line(process).split() for _ in range(len(names) + 1)]
        found = [int(line[0], 16) if line[0] != "(nil)" else 0 for line in lines[:-1]]
        yield process.pid, found, int(lines[-1][0], 16), int(lines[-1][1], 16)
        process.communicate()


def compiled(folder: Path, name: str, text: str, *flags: str) -> Path:
    source, out = folder / f"{name}.c", folder / name
    source.write_text(text)
    subprocess.run(["gcc", "-O1", "-Wl,--build-id", "-o", out, source, *flags], check=True)
    return out


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("modules")
    shared = ("-shared", "-fPIC", "-ftls-model=global-dynamic")
    return {
        "pie": compiled(folder, "pie", PROGRAM),
        "no-pie": compiled(folder, "no-pie", PROGRAM, "-no-pie"),
        "gnu": compiled(folder, "gnu.so", INTERPOSER, *shared, "-Wl,--hash-style=gnu"),
        "sysv": compiled(folder, "sysv.so", INTERPOSER, *shared, "-Wl,--hash-style=sysv"),
    }


def scope_of(pid: int, memory: Memory) -> tuple[tuple[Module, ...], Scope]:
    loaded = modules(mappings(pid), memory)
    main = next(module for module in loaded if module.path == str(Path(f"/proc/{pid}/exe").readlink()))
    return loaded, search_scope(loaded, main, memory)


NAMES = ("getppid", "puts", "malloc", "pthread_mutex_lock", "environ")


@pytest.mark.parametrize("kind", ["pie", "no-pie"])
def test_symbols_are_found_where_the_dynamic_linker_finds_them(programs: dict[str, Path], kind: str) -> None:
    with running(programs[kind], *NAMES) as (pid, found, _, _), Memory(pid) as memory:
        _, scope = scope_of(pid, memory)
        assert [resolve(name, "", scope, memory) for name in NAMES] == found
        assert resolve("puts", "GLIBC_2.2.5", scope, memory) in (found[1], resolve("puts", "", scope, memory))


@pytest.mark.parametrize("hash_style", ["gnu", "sysv"])
def test_a_preloaded_library_comes_first(programs: dict[str, Path], hash_style: str) -> None:
    preload = str(programs[hash_style])
    names = ("getppid", "only_here")
    with running(programs["pie"], *names, LD_PRELOAD=preload) as (pid, found, _, _), Memory(pid) as memory:
        _, scope = scope_of(pid, memory)
        assert [resolve("getppid", "GLIBC_2.2.5", scope, memory), resolve("only_here", "", scope, memory)] == found
        with pytest.raises(Refused, match="thread-local"):
            resolve("threads_own", "", scope, memory)


def test_a_plugin_of_somebody_else_is_not_searched(programs: dict[str, Path]) -> None:
    with running(programs["pie"], "only_here", PLUGIN=str(programs["gnu"])) as (pid, found, _, _):
        assert found == [0]
        with Memory(pid) as memory:
            loaded, scope = scope_of(pid, memory)
            assert any(module.path == str(programs["gnu"]) for module in loaded)
            with pytest.raises(Refused, match="not loaded") as caught:
                resolve("only_here", "", scope, memory)
            assert "libc.so.6" in caught.value.why


def test_what_nothing_defines_is_refused(programs: dict[str, Path]) -> None:
    with running(programs["pie"]) as (pid, _, _, _), Memory(pid) as memory:
        _, scope = scope_of(pid, memory)
        with pytest.raises(Refused, match=r"puts@GLIBC_9\.9"):
            resolve("puts", "GLIBC_9.9", scope, memory)
        assert resolve("nobody_has_this", "", scope, memory, weak=True) == 0


@pytest.mark.parametrize("kind", ["pie", "no-pie"])
def test_images_are_found_with_bias_and_build_id(programs: dict[str, Path], kind: str) -> None:
    notes = subprocess.run(["readelf", "-n", programs[kind]], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", programs[kind]], capture_output=True, text=True, check=True).stdout
    build_id = re.findall(r"Build ID: ([0-9a-f]+)", notes)[0]
    main = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" T main"))
    with running(programs[kind]) as (pid, _, _, address), Memory(pid) as memory:
        loaded = modules(mappings(pid), memory)
        module = find_module(loaded, build_id, kind)
        assert module.bias + main == address and address in module
        assert module.fixed_address is (kind == "no-pie")
        with pytest.raises(Refused, match="not loaded"):
            find_module(loaded, "00" * 20, "nobody")
        with pytest.raises(Refused, match="another build"):
            find_module(loaded, "00" * 20, kind)


def test_a_file_that_is_merely_read_is_no_module(programs: dict[str, Path], tmp_path: Path) -> None:
    reader = compiled(
        tmp_path,
        "reader",
        """
        #include <fcntl.h>
        #include <stdio.h>
        #include <sys/mman.h>
        int main(int c, char **v) {
            void *p = mmap(0, 1 << 14, PROT_READ, MAP_PRIVATE, open(v[c - 1], O_RDONLY), 0);
            printf("%p\\n", p); printf("0 0\\n"); fflush(stdout);
            return getchar();
        }
        """,
    )
    with running(reader, str(programs["pie"])) as (pid, found, _, _), Memory(pid) as memory:
        assert memory.read(found[0], 4) == b"\x7fELF"
        assert str(programs["pie"]) not in {module.path for module in modules(mappings(pid), memory)}


def test_the_break_begins_where_the_program_finds_it(programs: dict[str, Path]) -> None:
    with running(programs["pie"]) as (pid, _, end, _):
        heap = next(item for item in mappings(pid) if item.path == "[heap]")
        assert start_brk(pid) == heap.start == end
        assert stack_limit(pid) == stack_limit(os.getpid())


def test_a_note_is_found_behind_others_and_damage_gives_nothing() -> None:
    other = b"\x04\0\0\0\x04\0\0\0\x05\0\0\0GNU\0abcd"
    wanted = b"\x04\0\0\0\x03\0\0\0\x03\0\0\0GNU\0\x01\x02\x03\0"
    assert build_id_in_notes(other + wanted, 4) == "010203"
    assert build_id_in_notes(wanted[:-3], 4) == ""
    assert build_id_in_notes(b"\xff" * 64, 4) == ""


def test_memory_reads_writes_and_says_what_is_not_there(programs: dict[str, Path]) -> None:
    with running(programs["pie"]) as (pid, _, _, main), Memory(pid) as memory:
        code = memory.read(main, 16)
        memory.write(main, b"\x90" * 5)
        assert memory.read(main, 16) == b"\x90" * 5 + code[5:]
        assert memory.read_many([(main, 5), (main + 5, 11)] * 1500) == [b"\x90" * 5, code[5:]] * 1500
        for bad in (0, 1 << 47, -1, (1 << 64) - 4096):
            with pytest.raises(LivegraftError):
                memory.read(bad, 8)
            with pytest.raises(LivegraftError):
                memory.write(bad, b"12345678")
        with pytest.raises(LivegraftError, match=r"8 bytes at 0x10 "):
            memory.read_many([(main, 8), (16, 8)])
    with pytest.raises(LivegraftError):
        Memory(pid)


def test_memory_of_a_program_that_is_gone_is_not_that_of_its_successor(programs: dict[str, Path]) -> None:
    with running(programs["pie"]) as (pid, _, _, main):
        memory = Memory(pid)
    with memory, pytest.raises(LivegraftError):
        memory.read(main, 8)


def test_words_are_poked_where_the_kernel_does_not_write(programs: dict[str, Path]) -> None:
    with running(programs["pie"]) as (pid, _, _, main), Memory(pid) as memory:
        before = memory.read(main - 8, 32)
        poked: dict[int, int] = {}
        memory._poke_words(main + 3, b"\xaa" * 9, lambda address, word: poked.update({address: word}))
        low = min(poked)
        image = bytearray(before)
        for address, word in poked.items():
            assert address % 8 == 0
            start = address - (main - 8)
            image[start : start + 8] = word.to_bytes(8, "little")
        assert low <= main + 3
        assert image[:11] == before[:11] and image[11:20] == b"\xaa" * 9 and image[20:] == before[20:]


def test_what_proc_says_of_ourselves() -> None:
    own = status(os.getpid())
    assert (own.pid, own.tgid, own.uid, own.tracer_pid) == (os.getpid(), os.getpid(), os.geteuid(), 0)
    assert not own.kernel_thread and not own.zombie
    assert os.getpid() in thread_ids(os.getpid())
    with pytest.raises(BadInput):
        status(2**22 + 1)
    maps = mappings(os.getpid())
    inside = maps[3]
    assert mapping_over(maps, inside.start + 1, inside.size - 1) == inside
    assert mapping_over(maps, inside.start, inside.size + 1) is None
    assert mapping_over(maps, 0, 1) is None
