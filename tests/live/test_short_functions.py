"""Functions with little or no room for the entry jump: patched where there is padding, refused where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import LivegraftError, Refused
from patcher.pausing.conditions import Conditions
from patcher.transactions.transaction import apply
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for, sources, there_and_back

pytestmark = pytest.mark.root

OPAQUE = "#define OPAQUE __attribute__((noipa))\n"
TINY = OPAQUE + """
OPAQUE long tiny(long n) { return n EDIT; }
OPAQUE long behind(long n) { return -n; }
long answer(long n) { return tiny(n) * 10 + behind(n) * 1000; }
"""
ASKED = (0, 1, 2)


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


def builds(compiled: Compiler, text: str, *flags: str, **options: object) -> list[Path]:
    """Old and new: EDIT is nothing, then something."""
    return [compiled(sources(text, EDIT=edit), *flags, **options) for edit in ("", "+ 5")]  # type: ignore[arg-type]


def patched_and_back(old: Path, new: Path, folder: Path) -> None:
    with Running([old]) as process, Running([new]) as truth:
        before, after = process.ask(*ASKED), truth.ask(*ASKED)
        assert before != after
        there_and_back(process, patch_for(old, new, folder), before, after)


def refused_for(old: Path, new: Path, folder: Path, name: str) -> bool:
    try:
        patch_for(old, new, folder)
    except Refused as error:
        assert any(line.startswith("short-function") for line in error.details)
        assert any(name in line for line in error.details)
        return True
    return False


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("link", ["pie", "no-pie"])
def test_padding_behind_a_short_function_is_used(link: str, cc: str, compiled: Compiler, tmp_path: Path) -> None:
    text = TINY if cc == "gcc" else TINY.replace("noipa", "noinline")
    patched_and_back(*builds(compiled, text, link=link, cc=cc), tmp_path)


@pytest.mark.parametrize(
    ("cc", "flags"), [("gcc", ("-Os",)), ("gcc", ("-falign-functions=1",)), ("clang", ("-Oz",))], ids=str
)
def test_a_short_function_without_padding_is_refused(
    cc: str, flags: tuple[str, ...], compiled: Compiler, tmp_path: Path
) -> None:
    text = TINY if cc == "gcc" else TINY.replace("noipa", "noinline")
    old, new = builds(compiled, text, *flags, cc=cc, stripped=False)
    if not refused_for(old, new, tmp_path, "tiny"):
        assert cc == "clang"  # it may leave room by chance
        patched_and_back(old, new, tmp_path)


IN_ASSEMBLER = """
asm(".text\\nPLACE\\n.globl tiny\\n.type tiny, @function\\ntiny: .cfi_startproc\\nBODY\\n.cfi_endproc\\n"
    ".size tiny, .-tiny\\nBEHIND\\n");
long tiny(long);
long answer(long n) { return tiny(n); }
"""


def in_assembler(
    compiled: Compiler, body: str, place: str = ".p2align 4", behind: str = "", text: str = IN_ASSEMBLER
) -> list[Path]:
    """``body`` is the function; EDIT in it is an addition in the new build."""
    words = {"PLACE": place, "BEHIND": behind, "BODY": body}
    return [compiled(sources(text, **words, EDIT=edit)) for edit in ("", "add $5, %rax\\n")]


def test_nothing_but_padding_is_overwritten(compiled: Compiler, tmp_path: Path) -> None:
    patched_and_back(*in_assembler(compiled, "mov %rdi,%rax\\nEDIT ret", behind=".p2align 4"), tmp_path)
    old, new = in_assembler(compiled, "mov %rdi,%rax\\nEDIT ret", behind=".byte 0x17,0x17,0x17,0x17,0x17")
    with pytest.raises(Refused):
        patch_for(old, new, tmp_path)


def test_padding_that_something_names_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    """The last byte of the five is a table's first, by name."""
    behind = "marker: .byte 0x90,0x90,0x90,0x90\\n.p2align 4"
    marker = 'void *p; asm("lea marker(%%rip), %0" : "=r"(p)); return tiny(n) + *(char *)p;'
    text = IN_ASSEMBLER.replace("return tiny(n);", marker)
    old, new = in_assembler(compiled, "mov %rdi,%rax\\nEDIT ret", behind=behind, text=text)
    assert refused_for(old, new, tmp_path, "0x")


@pytest.mark.parametrize("offset", [4091, 4092, 4095])
def test_a_jump_never_crosses_a_page(offset: int, compiled: Compiler, tmp_path: Path) -> None:
    place = f".p2align 12\\n.skip {offset}, 0x90"
    old, new = in_assembler(compiled, "lea 1(%rdi),%rax\\nEDIT nop\\nnop\\nret", place=place)
    if offset + 5 <= 4096:
        patched_and_back(old, new, tmp_path)
    else:
        assert refused_for(old, new, tmp_path, "end of a page")


def test_a_loop_back_into_the_first_bytes(compiled: Compiler, tmp_path: Path) -> None:
    """Nobody runs the old body any more once nobody is in it: that is what the stack check is for."""
    body = "xor %eax,%eax\\n1: inc %rax\\ninc %rax\\ndec %rdi\\njg 1b\\nEDIT ret"
    patched_and_back(*in_assembler(compiled, body), tmp_path)
    body = "1: inc %rdi\\ncmp $9, %rdi\\njl 1b\\nmov %rdi,%rax\\nEDIT ret"
    patched_and_back(*in_assembler(compiled, body), tmp_path)


def test_a_branch_from_elsewhere_into_the_first_bytes_moves_too(compiled: Compiler, tmp_path: Path) -> None:
    """A second entry behind the first instruction (as behind an endbr64) is patched with its callers, or refused."""
    text = IN_ASSEMBLER.replace("return tiny(n);", "long second(long); return tiny(n) + 100 * second(n);")
    body = "endbr64\\n.globl second\\nsecond: lea 1(%rdi),%rax\\nEDIT ret"
    old, new = in_assembler(compiled, body, text=text)
    with Running([old]) as process, Running([new]) as truth:
        before, after = process.ask(*ASKED), truth.ask(*ASKED)
        try:
            patch = patch_for(old, new, tmp_path)
        except Refused:
            return
        there_and_back(process, patch, before, after)


PREPARED = {
    "nops inside": ("-fpatchable-function-entry=8",),
    "nops before and inside": ("-fpatchable-function-entry=16,8",),
    "fentry": ("-pg", "-mfentry"),
    "endbr64": ("-fcf-protection=full",),
}


@pytest.mark.parametrize("flags", PREPARED.values(), ids=PREPARED)
def test_prepared_entries_are_entries(flags: tuple[str, ...], compiled: Compiler, tmp_path: Path) -> None:
    patched_and_back(*builds(compiled, TINY.replace("return n EDIT", "return n * 3 EDIT"), *flags), tmp_path)


WAITS = OPAQUE + """
static void gone(long n) { printf("1 %ld\\n", n); fflush(stdout); for (;;) pause(); }
asm(".text\\n.p2align 4\\n.type calls, @function\\ncalls: .cfi_startproc\\ncall *%rsi\\nEDIT.cfi_endproc\\n"
    ".size calls, .-calls\\n.p2align 4");
void calls(long, void (*)(long));
long answer(long n) { if (n == 7) calls(n, gone); return n; }
"""


def test_a_return_address_in_the_padding_is_live(compiled: Compiler, tmp_path: Path) -> None:
    """A function of two bytes that ends in a call which never returns: the stack shows an address in its padding."""
    old, new = (compiled(sources(WAITS, EDIT=edit)) for edit in ("", "nop\\nud2\\n"))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as process:
        process.ask(7)
        with pytest.raises(LivegraftError, match="stayed live"):
            apply(process.pid, patch, Conditions(timeout=0.2))
