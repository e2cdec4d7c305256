"""Stacks at every instruction: a program is stepped, and ours is compared with what its calls and returns say.

An ordinary run steps through two builds; ``make soak`` through every build, linker and C library, through
libcrypto's assembler, and through the whole life of a program, from the first instruction of the dynamic linker.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fixtures.stacks import compile_program, functions_of
from fixtures.stepping import Stepper, stepped

from .steptruth import Comparison

pytestmark = pytest.mark.root

ORDINARY = {
    "gcc, lazy binding, IBT": ("gcc", "-O2", "-fcf-protection=full", "-Wl,-z,lazy"),
    "clang, static": ("clang", "-O2", "-static"),
}
FURTHER = {
    "gcc -O0": ("gcc", "-O0"),
    "gcc -O3": ("gcc", "-O3", "-fomit-frame-pointer", "-fcf-protection=none"),
    "gcc -Os": ("gcc", "-Os", "-Wl,-z,now"),
    "frame pointers, realigned stacks": (
        *("gcc", "-O2", "-fno-omit-frame-pointer", "-mpreferred-stack-boundary=5", "-mstackrealign", "-no-pie"),
    ),
    "clang": ("clang", "-O2"),
    "clang -O0": ("clang", "-O0"),
    "synchronous tables": ("gcc", "-O2", "-fno-asynchronous-unwind-tables", "-funwind-tables"),
    "synchronous tables of clang": ("clang", "-O2", "-fno-asynchronous-unwind-tables", "-funwind-tables"),
    "no search table": ("gcc", "-O2", "-Wl,--no-eh-frame-hdr"),
    "realigned with arguments on the stack": (
        *("gcc", "-O2", "-fno-omit-frame-pointer", "-mpreferred-stack-boundary=5", "-mincoming-stack-boundary=3"),
    ),
    "static": ("gcc", "-O2", "-static"),
    "static PIE": ("gcc", "-O2", "-static-pie"),
}
WITHOUT_PLT_TABLES = {
    "lld": ("clang", "-O2", "-fuse-ld=lld", "-Wl,-z,lazy"),
    "lld, IBT": ("gcc", "-O2", "-fuse-ld=lld", "-Wl,-z,now", "-fcf-protection=full", "-Wl,-z,force-ibt"),
    "mold": ("gcc", "-O2", "-fuse-ld=mold", "-Wl,-z,lazy"),
}
"""These linkers write no unwind information for the PLT."""
MUSL = {"musl": ("musl-gcc", "-O2", "-DPLAIN"), "musl, static": ("musl-gcc", "-O2", "-DPLAIN", "-static")}
"""Its start-up code has no unwind information, so no stack is complete."""


def compiled(folder: Path, compiler: str, *flags: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    return compile_program("steps.c", folder / "steps", "-w", *flags, "-lm", compiler=compiler)


def begin(stepper: Stepper, program: Path, name: str, *, throws: bool = False) -> Comparison:
    """Let the program run to the start of a function."""
    functions = {function.name: function for function in functions_of(program, stepper.pid)}
    stepper.run_to(functions[name].start)
    comparison = Comparison(stepper, functions_of(program, stepper.pid), throws=throws)
    stepper.began_in([frame.pc for frame in comparison.unwind().frames[1:]])
    return comparison


def step_through(program: Path, name: str) -> Comparison:
    """Step through begin(), which main() calls."""
    with stepped([program]) as stepper:
        comparison = begin(stepper, program, "begin")
        assert comparison.function_at(stepper.pcs[1]) == "main"
        end = next(function for function in comparison.functions if function.name == "finish")
        comparison.run(end.start)
        assert not stepper.ended
    comparison.report(name)
    assert comparison.garbled == []
    return comparison


C_LIBRARY = {"clone3", "swapcontext", "setcontext", "__setcontext", "__start_context", "__longjmp"}
"""What glibc itself says nothing about, in part: a stack that was just made; or where registers come from a buffer."""
REALIGNED = "saved outside of the frame"
"""The reason in the epilogue of a function that realigns its stack: there the tables of gcc are wrong."""


def require_nearly_all(comparison: Comparison) -> None:
    assert {name for name, why in comparison.incomplete_here if REALIGNED not in why} <= C_LIBRARY
    assert comparison.signal_frames > 20 and comparison.jumps > 5
    assert comparison.complete > 4000 and comparison.complete > 30 * len(comparison.incomplete)


@pytest.mark.parametrize("build", ORDINARY)
def test_every_instruction(build: str, tmp_path: Path) -> None:
    require_nearly_all(step_through(compiled(tmp_path, *ORDINARY[build]), build))


def test_a_frame_is_not_hidden_by_wrong_tables(tmp_path: Path) -> None:
    """A function of gcc that has realigned its stack returns to callers with frame pointers."""
    flags = FURTHER["realigned with arguments on the stack"]
    comparison = step_through(compiled(tmp_path, *flags), "realigned")
    assert any(REALIGNED in why for _, why in comparison.incomplete_here)


@pytest.mark.soak
@pytest.mark.parametrize("build", FURTHER)
def test_every_instruction_of_other_builds(build: str, tmp_path: Path) -> None:
    require_nearly_all(step_through(compiled(tmp_path, *FURTHER[build]), build))


@pytest.mark.soak
@pytest.mark.parametrize("build", WITHOUT_PLT_TABLES)
def test_a_stub_without_unwind_information_is_incomplete(build: str, tmp_path: Path) -> None:
    comparison = step_through(compiled(tmp_path, *WITHOUT_PLT_TABLES[build]), build)
    stubs = [place for place, why in comparison.incomplete if "no unwind information for" in why]
    assert len(stubs) > 50 and comparison.complete > 4000


@pytest.mark.soak
@pytest.mark.parametrize("build", MUSL)
def test_no_stack_of_musl_is_complete(build: str, tmp_path: Path) -> None:
    comparison = step_through(compiled(tmp_path, *MUSL[build]), build)
    assert comparison.complete == 0 and len(comparison.incomplete) > 3000


@pytest.mark.soak
def test_hand_written_assembler(tmp_path: Path) -> None:
    program = compile_program("steps.c", tmp_path / "steps", "-w", "-O2", "-DLIBCRYPTO", "-lm", "-lcrypto")
    comparison = step_through(program, "libcrypto")
    assert not comparison.incomplete_here
    assert comparison.complete > 10000


@pytest.mark.soak
def test_exceptions(tmp_path: Path) -> None:
    """Through the unwinder of the C++ library into a landing pad."""
    program = compile_program("shapes.cc", tmp_path / "program", "-O2", compiler="g++")
    with stepped([program]) as stepper:
        comparison = begin(stepper, program, "main", throws=True)
        comparison.run(0)
    comparison.report("exceptions")
    # Where libgcc puts the registers of the catching frame into its own, which is about to be left, word by word.
    assert 50 * len(comparison.garbled) < comparison.complete
    assert comparison.jumps > 5 and comparison.complete > 10000


@pytest.mark.soak
def test_a_whole_life(tmp_path: Path) -> None:
    """From the first instruction of the dynamic linker to exit(2)."""
    program = compiled(tmp_path, "gcc", "-O2", "-Wl,-z,lazy")
    with stepped([program]) as stepper:
        comparison = Comparison(stepper, functions_of(program, stepper.pid))
        comparison.run(0)
    comparison.report("whole life")
    assert comparison.garbled == []
    assert comparison.complete > 1000
