"""C++ programs patched while they run: virtual functions, types, static locals, constructors, the standard library."""

from __future__ import annotations

from pathlib import Path

import pytest

from elfdiff.errors import Refused
from patcher.transactions.transaction import apply, revert
from tests.compile import Compiler
from tests.live.grafting import Running, patch_for
from tests.live.throwing import program

pytestmark = pytest.mark.root

SHAPES = """
struct Shape { long side = 3; virtual long area() { return side; } virtual ~Shape() {} MEMBERS };
struct Square : Shape { SEPARATE long area() override { return side * side + VERSION; } };
struct Round : Shape { long area() override { return side * 3; } };
static std::vector<Shape *> kept;
SEPARATE Shape *make(long n) { if (n % 2) return new Round; return new Square; }
SEPARATE long all() { long sum = 0; for (auto *shape : kept) sum += shape->area(); return sum; }
SEPARATE long squares() {
    long found = VERSION;
    for (auto *shape : kept) {
        found += dynamic_cast<Square *>(shape) != nullptr;
        found += 10 * (typeid(*shape) == typeid(Round));
    }
    return found;
}
"""
SHAPE_CALLS = "if (n == 1) return all(); if (n == 2) return squares(); kept.push_back(make(n)); return kept.size();"
OTHERS = """
static long made, ended;
struct Counter { long n; SEPARATE Counter(long start) : n(start) { made++; } };
struct Marked { long n; SEPARATE Marked(long x) : n(x + VERSION) {} SEPARATE ~Marked() { ended += VERSION; } };
inline long shared = 5;
template <class T> SEPARATE T twice(T value) { return value + value + T(VERSION); }
SEPARATE long counted() { static Counter counter(7); shared++; return made * 100000 + counter.n++ + VERSION; }
SEPARATE long marked(long n) { long before = ended; { Marked mark(n); before -= mark.n; } return ended - before; }
SEPARATE long words(long n) {
    std::map<std::string, std::vector<long>> found;
    for (long i = 0; i < n; i++) found["number " + std::to_string(i % 3)].push_back(i + VERSION);
    long sum = 0;
    for (auto &[key, values] : found) for (long value : values) sum += value * (long)key.size();
    return sum;
}
"""
OTHER_CALLS = """
switch (n) {
case 0: return counted();
case 1: return marked(3);
case 2: return twice<long>(4) + (long)twice<double>(4.5);
case 3: return words(20);
}
return shared;
"""
FLAGS = ("-std=gnu++17", "-fexceptions")


@pytest.fixture(scope="session")
def compiled(cache_folder: Path) -> Compiler:
    return Compiler(cache_folder / "compiled")


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("cc", ["g++", "clang++"])
def test_objects_keep_their_types_and_get_the_new_virtual_functions(
    cc: str, level: str, compiled: Compiler, tmp_path: Path
) -> None:
    sources = (program(SHAPES, SHAPE_CALLS, MEMBERS="", VERSION=str(v)) for v in (1000, 2000))
    old, new = (compiled(source, *FLAGS, level, cc=cc) for source in sources)
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as running:
        assert running.ask(4, 3, 1, 2) == [1, 2, 1009 + 9, 1011]
        apply(running.pid, patch)
        assert running.ask(1, 2) == [2009 + 9, 2011]
        assert running.ask(4, 3, 1, 2) == [3, 4, 2 * 2009 + 2 * 9, 2022]
        revert(running.pid)
        assert running.ask(1, 2) == [2 * 1009 + 2 * 9, 1022]


def test_a_virtual_function_more_is_refused(compiled: Compiler, tmp_path: Path) -> None:
    versions = ("", "virtual long more() { return 1; }")
    old, new = (compiled(program(SHAPES, SHAPE_CALLS, MEMBERS=m, VERSION="1"), *FLAGS, cc="g++") for m in versions)
    with pytest.raises(Refused) as refused:
        patch_for(old, new, tmp_path)
    assert "class-layout" in {finding.code for finding in refused.value.findings}


@pytest.mark.parametrize("level", ["-O0", "-O2"])
@pytest.mark.parametrize("cc", ["g++", "clang++"])
def test_what_was_initialised_stays_initialised(cc: str, level: str, compiled: Compiler, tmp_path: Path) -> None:
    builds = [compiled(program(OTHERS, OTHER_CALLS, VERSION=str(v)), *FLAGS, level, cc=cc) for v in (10, 20)]
    patch = patch_for(*builds, tmp_path)
    with Running([builds[0]]) as old, Running([builds[1]]) as new:
        before, after = old.ask(1, 2, 3), new.ask(1, 2, 3)
    assert before != after
    with Running([builds[0]]) as running:
        assert running.ask(0, 0, 4) == [100017, 100018, 7]
        apply(running.pid, patch)
        assert running.ask(0, 4) == [100029, 8]
        assert running.ask(1, 2, 3) == after
        revert(running.pid)
        assert running.ask(0, 4, 1, 2, 3) == [100020, 9, *before]


def test_library_of_classes(compiled: Compiler, tmp_path: Path) -> None:
    """The whole program linked with the C++ library inside: its classes are the program's own."""
    flags = (*FLAGS, "-static-libgcc", "-static-libstdc++")
    old, new = (compiled(program(OTHERS, OTHER_CALLS, VERSION=str(v)), *flags, cc="g++") for v in (10, 20))
    patch = patch_for(old, new, tmp_path)
    with Running([old]) as first, Running([new]) as second:
        before, after = first.ask(1, 2, 3), second.ask(1, 2, 3)
    with Running([old]) as running:
        assert running.ask(1, 2, 3) == before
        apply(running.pid, patch)
        assert running.ask(1, 2, 3) == after
        revert(running.pid)
        assert running.ask(1, 2, 3) == before
