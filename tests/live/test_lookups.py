"""The stand-ins for the functions that look up unwind tables, called as functions in a process of their own.

What they pass on to is the host's: it says what it was asked and overwrites every register that a function may.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from fixtures.hearing import next_line
from tests.compile import Compiler
from trampolines.lookup_x86_64 import Answer, Lookup, find_object, iterate

HOST = r"""
#define _GNU_SOURCE
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <fcntl.h>
#define AREA 0x10000
#define SENT "0x5a5a000000000000 + "
uint64_t kept, misaligned;
long calls, passed_on, stop_at, code, objects, told_size;
uint64_t seen_address, seen_result, result[14];
static int told;
struct { struct dl_phdr_info info; uint64_t size, data; char name[64]; ElfW(Phdr) headers[8]; } list[16];
int callback_c(struct dl_phdr_info *info, size_t size, void *data) {
    list[told].info = *info; list[told].size = size; list[told].data = (uint64_t)data;
    strncpy(list[told].name, info->dlpi_name, 63);
    memcpy(list[told].headers, info->dlpi_phdr, info->dlpi_phnum * sizeof(ElfW(Phdr)));
    return ++told == stop_at ? code : 0;
}
long find_c(uint64_t address, uint64_t into) {
    passed_on++; seen_address = address; seen_result = into; ((uint64_t *)into)[0] = 77; return -5;
}
int iterate_c(int (*told_to)(struct dl_phdr_info *, size_t, void *), void *data) {
    passed_on++;
    for (long k = 0; k < objects; k++) {
        struct dl_phdr_info info; memset(&info, 0xcc, sizeof info);
        static ElfW(Phdr) header = {.p_type = PT_NOTE};
        info.dlpi_addr = 0x1000 * k; info.dlpi_name = "real"; info.dlpi_phdr = &header; info.dlpi_phnum = 1;
        info.dlpi_adds = 40 + k; info.dlpi_subs = 50 + k;
        int answer = told_to(&info, told_size, data);
        if (answer) return answer;
    }
    return 0;
}
#define SPOILT(register) "mov " register ", -1\n"
#define SPOIL SPOILT("rcx") SPOILT("rdx") SPOILT("rsi") SPOILT("rdi") SPOILT("r8") SPOILT("r9") SPOILT("r10") \
    SPOILT("r11")
#define ALIGNED "lea rax, [rsp + 8]\n and eax, 15\n or qword ptr [rip + misaligned], rax\n"
#define SAME(register, number) "mov rax, " SENT #number "\n cmp " register ", rax\n jne 1f\n"
#define SET(register, number) "mov " register ", " SENT #number "\n"
asm(".intel_syntax noprefix\n.text\n"
    "callback: " ALIGNED "push rbx\n call callback_c\n pop rbx\n" SPOIL "ret\n"
    "find: " ALIGNED "push rbx\n call find_c\n pop rbx\n" SPOIL "ret\n"
    "iterate: " ALIGNED "push rbx\n call iterate_c\n pop rbx\n" SPOIL "ret\n"
    "checked_call: push rbx\n push rbp\n push r12\n push r13\n push r14\n push r15\n push rdx\n"
    "mov rax, rdi\n mov rdi, rsi\n mov rsi, rdx\n"
    SET("rbx", 1) SET("rbp", 2) SET("r12", 3) SET("r13", 4) SET("r14", 5) SET("r15", 6)
    "mov qword ptr [rip + place], rsp\n call rax\n mov rcx, rax\n mov qword ptr [rip + kept], 0\n"
    "cmp qword ptr [rip + place], rsp\n jne 1f\n"
    SAME("rbx", 1) SAME("rbp", 2) SAME("r12", 3) SAME("r13", 4) SAME("r14", 5) SAME("r15", 6)
    "mov qword ptr [rip + kept], 1\n"
    "1: mov rsp, qword ptr [rip + place]\n mov rax, rcx\n pop rdx\n"
    "pop r15\n pop r14\n pop r13\n pop r12\n pop rbp\n pop rbx\n ret\n"
    ".bss\nplace: .quad 0\n.text\n.att_syntax\n");
long checked_call(uint64_t function, uint64_t first, uint64_t second);
void callback(void), find(void), iterate(void);
int main(void) {
    char *area = mmap(0, AREA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), line[512], path[400];
    printf("%lu %lu %lu\n", (uint64_t)area, (uint64_t)find, (uint64_t)iterate);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        uint64_t entry, address;
        told = passed_on = misaligned = 0;
        if (sscanf(line, "load %399s", path) == 1) {
            int file = open(path, O_RDONLY);
            if (mmap(area, AREA, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, file, 0) != area) return 3;
            puts("loaded");
        } else if (sscanf(line, "find %lu %lu", &entry, &address) == 2) {
            memset(result, 0xee, sizeof result);
            long answer = checked_call(entry, address, (uint64_t)(result + 1));
            printf("%ld %lu %lu %ld %d", answer, kept, misaligned, passed_on,
                   passed_on && seen_address == address && seen_result == (uint64_t)(result + 1));
            for (int k = 0; k < 14; k++) printf(" %lu", result[k]);
            puts("");
        } else if (sscanf(line, "iterate %lu %ld %ld %ld %ld", &entry, &objects, &told_size, &stop_at, &code) == 5) {
            memset(list, 0, sizeof list);
            long answer = checked_call(entry, (uint64_t)callback, 0x1234);
            printf("%d %lu %lu %ld %d", (int)answer, kept, misaligned, passed_on, told);
            for (int k = 0; k < told; k++) {
                printf("|%lu %lu %lu %llu %llu %lu %lu %s|", list[k].size, list[k].data, list[k].info.dlpi_addr,
                       list[k].info.dlpi_adds, list[k].info.dlpi_subs, list[k].info.dlpi_tls_modid,
                       (uint64_t)list[k].info.dlpi_tls_data, list[k].name);
                for (int h = 0; h < list[k].info.dlpi_phnum; h++)
                    printf(" %u %u %lu %lu", list[k].headers[h].p_type, list[k].headers[h].p_flags,
                           list[k].headers[h].p_vaddr, list[k].headers[h].p_memsz);
            }
            puts("");
        } else return 4;
        fflush(stdout);
    }
    return 0;
}
"""
PAGE = 4096
UNTOUCHED = 0xEEEEEEEEEEEEEEEE
PT_LOAD, PT_NOTE, PT_GNU_EH_FRAME = 1, 4, 0x6474E550
READ, READ_EXECUTE = 4, 5
DATA = 0x1234
CODE = 0x7F0000001000


def answer_for(*ranges: tuple[int, int]) -> Answer:
    return Answer(
        ranges=ranges, low=CODE - PAGE, high=CODE + 64 * PAGE, link_map=0x55AA00001230,
        eh_frame_hdr=CODE + 60 * PAGE, name="livegraft patch 0123456789ab",
    )  # fmt: skip


class Host:
    """The process in which a stand-in is called."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._file = folder / "stand-in"
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.area, self.find, self.iterate = map(int, self._line().split())

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def _line(self) -> str:
        return next_line(self._process).strip()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        return self._line()

    def load(self, made: Lookup, offset: int = 0) -> int:
        """Map a stand-in, ``offset`` bytes into a page; the absolute address of its function."""
        self._file.unlink(missing_ok=True)  # the old one is still mapped
        self._file.write_bytes((bytes(offset) + made.code).ljust(PAGE * 16, b"\xcc"))
        assert self._ask(f"load {self._file}") == "loaded"
        return self.area + offset + made.entry

    def asked(self, entry: int, address: int) -> tuple[int, bool, list[int]]:
        """What a stand-in for _dl_find_object returns, whether it has passed the question on, and the result."""
        returned, kept, misaligned, passed_on, same, before, *result = map(
            int, self._ask(f"find {entry} {address}").split()
        )
        assert (kept, misaligned, passed_on) == (1, 0, same)
        assert (before, result[-1]) == (UNTOUCHED, UNTOUCHED)
        return returned, bool(passed_on), result[:-1]

    def told(
        self, entry: int, objects: int, *, size: int = 64, stop_at: int = -1, code: int = 0
    ) -> tuple[int, list[tuple[list[str], list[int]]]]:
        """What a stand-in for dl_iterate_phdr returns, and each object of which the callback was told."""
        first, *rest = self._ask(f"iterate {entry} {objects} {size} {stop_at} {code}").split("|")
        returned, kept, misaligned, passed_on, told = map(int, first.split())
        assert (kept, misaligned, passed_on) == (1, 0, 1)
        listed = [
            (fields.split(maxsplit=7), [int(word) for word in headers.split()])
            for fields, headers in zip(rest[::2], rest[1::2], strict=True)
        ]
        assert len(listed) == told
        return returned, listed


@pytest.fixture
def host(cache_folder: Path, tmp_path: Path) -> Iterator[Host]:
    program = Compiler(cache_folder / "compiled")(HOST, "-fno-lto")
    with Host(program, tmp_path) as started:
        yield started


@pytest.mark.parametrize("offset", [0, 16, 4000])
@pytest.mark.parametrize("count", [1, 2, 9], ids=lambda count: f"{count} ranges")
def test_code_of_the_patch_is_found_and_any_other_is_asked_for_elsewhere(count: int, offset: int, host: Host) -> None:
    ranges = tuple((CODE + 4 * PAGE * n, CODE + 4 * PAGE * n + PAGE) for n in range(count))
    answer = answer_for(*ranges)
    entry = host.load(find_object(answer, host.find), offset)
    found = [0, answer.low, answer.high, answer.link_map, answer.eh_frame_hdr, *[0] * 7]
    elsewhere = [77, *[UNTOUCHED] * 11]
    for start, end in ranges:
        for address in (start, start + 1, (start + end) // 2, end - 1):
            assert host.asked(entry, address) == (0, False, found)
        for address in (start - 1, end, end + 1):
            assert host.asked(entry, address) == (-5, True, elsewhere)
    for address in (0, 1, answer.low, answer.high, (1 << 64) - 1, 1 << 63):
        assert host.asked(entry, address) == (-5, True, elsewhere)


def test_ranges_in_both_halves_of_the_address_space(host: Host) -> None:
    """Addresses are compared without sign."""
    top = (1 << 64) - 2 * PAGE
    entry = host.load(find_object(answer_for((top, top + PAGE)), host.find))
    assert [host.asked(entry, address)[1] for address in (top - 1, top, top + PAGE, 0)] == [True, False, True, True]


@pytest.mark.parametrize("offset", [0, 2000])
def test_the_patch_is_told_once_after_the_first_object(offset: int, host: Host) -> None:
    answer = answer_for((CODE, CODE + PAGE), (CODE + 8 * PAGE, CODE + 10 * PAGE))
    entry = host.load(iterate(answer, host.iterate, host.area + offset), offset)
    returned, listed = host.told(entry, 3)
    assert returned == 0
    assert [fields[-1] for fields, _ in listed] == ["real", answer.name, "real", "real"]
    fields, headers = listed[1]
    assert [int(word) for word in (*fields[:2], *fields[3:7])] == [64, DATA, 40, 50, 0, 0]
    base = int(fields[2])
    assert base <= CODE, "LLVM's libunwind passes over objects whose load address is beyond the code"
    assert [
        (kind, flags, base + vaddr, size) for kind, flags, vaddr, size in zip(*[iter(headers)] * 4, strict=True)
    ] == [
        (PT_LOAD, READ_EXECUTE, CODE, PAGE),
        (PT_LOAD, READ_EXECUTE, CODE + 8 * PAGE, 2 * PAGE),
        (PT_GNU_EH_FRAME, READ, answer.eh_frame_hdr, 8),
    ]
    for number, (fields, headers) in enumerate([listed[0], *listed[2:]]):
        assert [int(word) for word in fields[:5]] == [64, DATA, 0x1000 * number, 40 + number, 50 + number]
        assert headers[0] == PT_NOTE


def test_a_callback_stops_where_it_wants_to(host: Host) -> None:
    entry = host.load(iterate(answer_for((CODE, CODE + PAGE)), host.iterate, host.area))
    whole = ["real", answer_for((CODE, CODE + PAGE)).name, "real", "real"]
    for stop_at in range(1, 5):
        for code in (1, -1, 12345, -(1 << 31)):
            returned, listed = host.told(entry, 3, stop_at=stop_at, code=code)
            assert returned == code
            assert [fields[-1] for fields, _ in listed] == whole[:stop_at]


def test_where_nothing_is_loaded_nothing_is_told(host: Host) -> None:
    entry = host.load(iterate(answer_for((CODE, CODE + PAGE)), host.iterate, host.area))
    assert host.told(entry, 0) == (0, [])


@pytest.mark.parametrize("size", [32, 47, 48, 63, 64, 65, 100])
def test_callbacks_are_told_the_size_that_there_is(size: int, host: Host) -> None:
    """The counters are behind the first 32 bytes; what a later C library adds is not there for the patch."""
    entry = host.load(iterate(answer_for((CODE, CODE + PAGE)), host.iterate, host.area))
    _, listed = host.told(entry, 2, size=size)
    assert [int(fields[0]) for fields, _ in listed] == [size, min(size, 64), size]
    assert [int(word) for word in listed[1][0][3:5]] == ([40, 50] if size >= 48 else [0, 0])


def test_stand_ins_of_several_patches_are_passed_in_turn(host: Host) -> None:
    """One slot, two patches: each is told, once, whichever is asked first."""
    near, far = answer_for((CODE, CODE + PAGE)), answer_for((CODE + 2 * PAGE, CODE + 3 * PAGE))
    behind = iterate(near, host.iterate, host.area)
    gap = -(-len(behind.code) // 16) * 16
    front = iterate(far, host.area + behind.entry, host.area + gap)
    joined = Lookup(behind.code.ljust(gap, b"\xcc") + front.code, gap + front.entry)
    entry = host.load(joined)
    for stop_at, length in ((-1, 4), (1, 1), (2, 2), (3, 3), (4, 4)):
        returned, listed = host.told(entry, 2, stop_at=stop_at, code=9)
        assert returned == (0 if stop_at < 0 else 9)
        patches = [headers[2] + int(fields[2]) for fields, headers in listed[1:3]]
        assert patches == [far.ranges[0][0], near.ranges[0][0]][: length - 1]
        assert len(listed) == length
