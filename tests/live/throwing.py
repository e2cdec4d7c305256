"""A C++ program that throws, catches and unwinds in every way, in two versions, for the tests of exceptions.

``answer(n)`` does the n-th thing; what it says differs by 1000 between the versions, and by nothing else. So the new
build, run by itself, says what a patched old one must say.
"""

from __future__ import annotations

from tests.live.grafting import MAIN, PRELUDE

INCLUDES = """
#include <atomic>
#include <cxxabi.h>
#include <exception>
#include <execinfo.h>
#include <map>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <typeinfo>
#include <unwind.h>
#include <vector>
"""
TYPES = """
struct Plain { long n; };
struct Base : std::runtime_error { using std::runtime_error::runtime_error; virtual long tell() const { return 1; } };
struct Derived : Base { using Base::Base; long tell() const override { return 2; } };
namespace { struct Hidden { long n; }; }
static long cleaned;
struct Guard { SEPARATE ~Guard() { cleaned++; } };
static void *const forced = (void *)1;
SEPARATE void thrower(long n) {
    switch (n) {
    case 0: throw Plain{5};
    case 1: throw Base("base");
    case 2: throw Derived("derived");
    case 3: throw 7;
    case 4: throw std::out_of_range("range");
    case 5: throw Hidden{11};
    }
}
"""
CHANGED = """
SEPARATE long throws(long n) {
    Guard g;
    if (n == 1) throw Derived("one");
    throw std::string(1, 's') + std::to_string(VERSION);
}
SEPARATE long catches(long n) {
    Guard g;
    try { thrower(n); return 1; }
    catch (const Plain &p) { return VERSION + p.n; }
    catch (const Base &b) { return VERSION + 10 * b.tell(); }
    catch (int i) { return VERSION + i; }
    catch (const Hidden &h) { return VERSION + h.n; }
}
SEPARATE long passes(long n) { Guard g; std::string s(40 + n, 'x'); thrower(n); return VERSION + s.size(); }
SEPARATE long rethrows(long n) { try { thrower(n); } catch (...) { cleaned += VERSION; throw; } return 0; }
SEPARATE long nests(long n) {
    try {
        try { thrower(0); }
        catch (Plain &p) { try { thrower(2); } catch (Base &b) { p.n += b.tell() + VERSION; } throw; }
    } catch (Plain &p) { return p.n; }
    return 0;
}
SEPARATE long fences(long n) noexcept { thrower(n); return VERSION; }
SEPARATE void *waits(void *n) {
    Guard g; std::string s(50, 'y'); cleaned += VERSION;
    for (;;) sleep(100);
    return &s[0];
}
SEPARATE long counts(_Unwind_Reason_Code (*f)(_Unwind_Context *, void *)) {
    Guard g; long n = VERSION; _Unwind_Backtrace(f, &n); return n;
}
SEPARATE long counts_too() { Guard g; void *frames[64]; return VERSION + backtrace(frames, 64); }
SEPARATE long in_thread(long n) {
    std::exception_ptr caught;
    std::thread([&] { try { thrower(n); } catch (...) { caught = std::current_exception(); } }).join();
    try { std::rethrow_exception(caught); } catch (const Base &b) { return VERSION + b.tell(); }
}
SEPARATE long words(long n) {
    std::map<std::string, long> known{{std::string(20, 'a'), 1}, {std::string(30, 'b'), VERSION}};
    try { return known.at(std::string(n ? 30 : 29, 'b')); }
    catch (const std::out_of_range &e) { return VERSION + known.size(); }
}
"""
CALLS = """
static _Unwind_Reason_Code one_more(_Unwind_Context *, void *n) { ++*(long *)n; return _URC_NO_REASON; }
SEPARATE long ends(long n) {
    pid_t child = fork();
    if (!child) { fclose(stdout); fclose(stderr); _exit(fences(n) ? 3 : 4); }
    int status; waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 100 + WEXITSTATUS(status);
}
static SEPARATE long cancels() {
    pthread_t thread; void *result; long before = cleaned;
    pthread_create(&thread, nullptr, waits, nullptr);
    while (__atomic_load_n(&cleaned, __ATOMIC_SEQ_CST) == before) usleep(1000);
    pthread_cancel(thread); pthread_join(thread, &result);
    return (result == PTHREAD_CANCELED) * 100 + cleaned - before;
}
SEPARATE long all(long n) {
    long before = cleaned;
    try {
        switch (n) {
        case 0: return throws(1);
        case 1: return throws(2);
        case 2: case 3: case 4: case 5: return catches(n - 2) + cleaned - before;
        case 6: return catches(4);
        case 7: return catches(5);
        case 8: return passes(0);
        case 9: return passes(4);
        case 10: return passes(9);
        case 11: return rethrows(2);
        case 12: return nests(n);
        case 13: return 1000 * (fences(9) / 1000) + ends(0);
        case 14: return CANCELLED;
        case 15: return counts(one_more);
        case 16: return counts_too();
        case 17: return in_thread(2);
        case 18: return words(0);
        case 19: return words(1);
        }
    }
    catch (const Plain &p) { return p.n * 100 + cleaned - before; }
    catch (const Base &b) { return b.tell() * 100 + cleaned - before; }
    catch (const std::string &s) { return atol(s.c_str() + 1) + cleaned - before; }
    catch (const std::exception &e) { return strlen(e.what()) * 100 + cleaned - before; }
    return -1;
}
"""
ASKED = range(20)
BACKTRACE = 16
UNVERSIONED = frozenset({0, 6, 8, 9})
"""What is not said by the version: only that the exception arrives, and that the cleanups have run."""


def program(text: str, calls: str, **words: str) -> dict[str, str]:
    """The file of a program with C++ text; ``calls`` is the body of ``answer(long n)``."""
    whole = PRELUDE.replace("#include <stdio.h>", INCLUDES + "#include <stdio.h>") + text
    whole += f"long answer(long n) {{ {calls} }}\n"
    for word, replacement in words.items():
        whole = whole.replace(word, replacement)
    return {"main.cc": whole + MAIN}


def everything(version: int, *, cancels: bool = True) -> dict[str, str]:
    """The whole program in version 1 or 2; ``cancels``: it also cancels threads."""
    what = "cancels()" if cancels else "VERSION"
    return program(TYPES + CHANGED + CALLS, "return all(n);", CANCELLED=what, VERSION=str(1000 * version))
