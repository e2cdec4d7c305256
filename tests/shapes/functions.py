"""Shapes of functions: how they are called, split, copied, merged and pointed to."""

from __future__ import annotations

from dataclasses import replace

from tests.shapes.model import CLANG, FIXED, GCC, GUARDED, PLAIN, SMALL, STATIC, USUAL, Shape

AMBIGUOUS = frozenset(("ambiguous-function",))
MOLD = replace(GCC, flags=("-ffunction-sections", "-fuse-ld=mold", "-Wl,--icf=all"))
LLD = replace(CLANG, flags=("-ffunction-sections", "-fuse-ld=lld", "-Wl,--icf=all"))
GOLD = replace(GCC, flags=("-ffunction-sections", "-fuse-ld=gold", "-Wl,--icf=all"))
FOLDED = (MOLD, LLD, GOLD)

POINTERS = r"""
SEPARATE static int add(int n) { return n + PICK(10, 20) + zero; }
SEPARATE static int sub(int n) { printf("sub "); return n - 1; }
#if VERSION > 1
SEPARATE static int mul(int n) { printf("mul "); return n * 3; }
#endif
static int (*kept)(int); static int (*table[2])(int) = {add, sub};
static int (*const fixed[])(int) = {sub, add,
#if VERSION > 1
    mul,
#endif
};
SEPARATE void keep(void) { if (!kept) kept = add; }
SEPARATE int same(void) { return kept == add && table[0] == add && fixed[1] == kept; }
SEPARATE int call(int n) { COUNT; return fixed[n % (sizeof fixed / sizeof *fixed)](n) + PICK(0, 1); }
void answer(int n) { keep(); printf("%d %d ", call(n), same()); printf("%d %d", kept(n), table[n & 1](n)); }
"""

LARGE = r"""
static unsigned cells[64];
#define S(k) x = x * 31 + (x >> ((k) % 13)) + cells[(x + k) & 63]; if (x % 1009 == k) cells[(k) & 63] ^= zero;
#define S10(k) S(k) S(k + 1) S(k + 2) S(k + 3) S(k + 4) S(k + 5) S(k + 6) S(k + 7) S(k + 8) S(k + 9)
#define S100(k) S10(k) S10(k + 10) S10(k + 20) S10(k + 30) S10(k + 40) S10(k + 50) S10(k + 60) S10(k + 70) S10(k + 80)
SEPARATE unsigned large(unsigned x) {
    COUNT;
    S100(0) S100(100) S100(200) x += PICK(1, 2); S100(300) S100(400) S100(500) S100(600) S100(700) S100(800) S100(900)
    S100(1000) S100(1100) S100(1200)
    return x;
}
void answer(int n) { printf("%u", large(n)); }
"""

SHAPES = (
    Shape(
        "new functions",
        r"""
#if VERSION > 1
SEPARATE static int helper(int n) { printf("helper "); return n * n; }
SEPARATE int fresh(int n) { return helper(n) + (n > 3 ? fresh(n - 1) : 0); }
#endif
SEPARATE int act(int n) {
    COUNT;
#if VERSION > 1
    return fresh(n) + 1;
#else
    return n;
#endif
}
void answer(int n) { printf("%d", act(n)); }
""",
        builds=(*USUAL, *PLAIN, *STATIC),
    ),
    Shape("pointers to functions", POINTERS, builds=(*USUAL, *FIXED, *GUARDED, *PLAIN)),
    Shape(
        "inlined into several callers",
        r"""
static inline __attribute__((always_inline)) int limit(int n) { return n > PICK(3, 4) ? PICK(3, 4) : n; }
SEPARATE int one(int n) { COUNT; return limit(n) + 1; }
SEPARATE int two(int n) { return limit(n * 2) * 5; }
SEPARATE int three(int n) { printf("%d ", limit(n)); return limit(n + 1) - limit(n - 1); }
SEPARATE int four(int n) { return n ^ 4; }
void answer(int n) { printf("%d %d %d %d", one(n), two(n), three(n), four(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "clones",
        r"""
struct wide { int a, b, c, d; };
static __attribute__((noinline)) int picked(struct wide *w, int unused) { return w->a * PICK(2, 3) + w->d + zero; }
static __attribute__((noinline)) int powered(int base, int times) {
    int x = 1;
    for (int k = 0; k < times; k++) { x *= base + PICK(0, 1); if (x > 100000) printf("big "); }
    return x;
}
static __attribute__((noinline)) int partly(int n) { if (n < 2) return n; printf("much to do %d ", n); COUNT;
    served--; return n * 2; }
SEPARATE int a(int n) { struct wide w = {n, 1, 2, 3}; return picked(&w, 1) + powered(n, 7) + partly(n); }
SEPARATE int b(int n) { struct wide w = {n, 4, 2, n}; return picked(&w, 2) - powered(n, 7) + partly(n + 1); }
void answer(int n) { COUNT; int x = a(n); printf("%d %d", x, b(n)); }
""",
        builds=(*USUAL, replace(GCC, level="-O3"), *SMALL),
    ),
    Shape(
        "cold parts",
        r"""
__attribute__((cold, noinline)) static void complain(int n) { printf(PICK("bad %d ", "very bad: %d "), n); }
SEPARATE int act(int n) {
    COUNT;
    if (__builtin_expect(n == 5, 0)) { complain(n); printf("%s ", PICK("cold", "colder")); complain(n + 1); return -n; }
    return n + 1;
}
SEPARATE int steady(int n) {
    if (__builtin_expect(n == 2, 0)) { complain(n); complain(n * 2); return -n; }
    return n + 2;
}
__attribute__((hot, noinline)) int hot(int n) { return n * PICK(5, 6) + zero; }
void answer(int n) { printf("%d ", act(n)); printf("%d ", steady(n)); printf("%d", hot(n)); }
""",
        builds=(*USUAL, replace(GCC, level="-O3"), *GUARDED),
    ),
    Shape(
        "only the cold part changes",
        r"""
#include <errno.h>
__attribute__((cold, noinline)) static void complain(const char *s, int n) { printf("%s %d ", s, n); }
SEPARATE int act(int n) {
    COUNT;
    if (__builtin_expect(n == 5, 0)) { complain(PICK("bad", "worse"), n); complain("again", n + PICK(1, 2));
    return -n; }
    return n + 1;
}
void answer(int n) { printf("%d", act(n)); }
""",
        builds=USUAL,
    ),
    Shape(
        "two equal functions that part",
        r"""
SEPARATE static int one(int n) { printf("same "); return n * 3 + zero; }
SEPARATE static int two(int n) { printf(PICK("same ", "different ")); return n * 3 + zero; }
SEPARATE int first(int n) { COUNT; return one(n) + 1; }
SEPARATE int second(int n) { return two(n) + 2; }
void answer(int n) { int a = first(n); printf("%d %d", a, second(n)); }
""",
        builds=(*USUAL, *FOLDED),
    ),
    Shape(
        "two equal functions that part, with pointers to them in live data",
        r"""
SEPARATE static int one(int n) { printf("same "); return n * 3 + zero; }
SEPARATE static int two(int n) { printf(PICK("same ", "different ")); return n * 3 + zero; }
static int (*handlers[2])(int);
SEPARATE void install(void) { if (!handlers[0]) { handlers[0] = one; handlers[1] = two; } }
void answer(int n) { COUNT; install(); printf("%d", handlers[n & 1](n) + PICK(0, 1)); }
""",
        builds=FOLDED,
        refused=AMBIGUOUS,
    ),
    Shape(
        "two functions that become equal, with pointers to them in live data",
        r"""
SEPARATE static int one(int n) { printf("same "); return n * 3 + zero; }
SEPARATE static int two(int n) { printf(PICK("different ", "same ")); return n * 3 + zero; }
static int (*handlers[2])(int);
SEPARATE void install(void) { if (!handlers[0]) { handlers[0] = one; handlers[1] = two; } }
void answer(int n) { COUNT; install(); printf("%d", handlers[n & 1](n) + PICK(0, 1)); }
""",
        builds=FOLDED,
        refused=AMBIGUOUS,
    ),
    Shape(
        "two functions that become equal",
        r"""
SEPARATE static int one(int n) { printf("same "); return n * 3 + zero; }
SEPARATE static int two(int n) { printf(PICK("different ", "same ")); return n * 3 + zero; }
SEPARATE int first(int n) { COUNT; return one(n) + 1; }
SEPARATE int second(int n) { return two(n) + 2; }
void answer(int n) { int a = first(n); printf("%d %d", a, second(n)); }
""",
        builds=(*USUAL, *FOLDED),
    ),
    Shape(
        "a loop into the first bytes",
        r"""
SEPARATE const char *skip(const char *p) { do p++; while (*p == PICK(' ', '.')); return p; }
SEPARATE unsigned gcd(unsigned a, unsigned b) { return b == 0 ? a + PICK(0, 1) : gcd(b, a % b); }
SEPARATE int bits(unsigned n) { int k = 0; do k += n & PICK(1, 3); while (n >>= 1); return k; }
void answer(int n) { COUNT; printf("%s %d %d", skip(n & 1 ? "x...ab c" : "x   a b.c"), gcd(n * 12, 18), bits(n)); }
""",
        builds=(*USUAL, *SMALL),
    ),
    Shape(
        "tail calls",
        r"""
SEPARATE int last(int n) { return n * PICK(2, 3) + zero; }
SEPARATE int steady(int n) { return n - 1 + zero; }
static int (*through)(int) = last;
SEPARATE int into_changed(int n) { return last(n + 1); }
SEPARATE int into_steady(int n) { COUNT; return steady(n + PICK(1, 2)); }
SEPARATE int by_pointer(int n) { return through(n ^ PICK(1, 2)); }
void answer(int n) { int a = into_steady(n); printf("%d %d %d", a, into_changed(n), by_pointer(n)); }
""",
        builds=(*USUAL, *GUARDED),
    ),
    Shape(
        "recursion",
        r"""
SEPARATE int odd(int n);
SEPARATE int even(int n) { printf(PICK("e", "E")); return n == 0 ? 1 : odd(n - 1) + 1; }
SEPARATE int odd(int n) { printf("o"); return n == 0 ? 0 : even(n - 1) + 1; }
SEPARATE int deep(int n, int m) { return m ? deep(n + PICK(1, 2), m - 1) * 2 + deep(n, m / 2 - (m > 1)) : n; }
void answer(int n) { COUNT; int a = even(n); printf(" %d %d", a, deep(n, n)); }
""",
        builds=USUAL,
    ),
    Shape(
        "variable arguments",
        r"""
#include <stdarg.h>
SEPARATE double sum(const char *kinds, ...) {
    va_list list; double s = 0; va_start(list, kinds);
    for (; *kinds; kinds++) s += *kinds == 'd' ? va_arg(list, double) * PICK(1, 2) : va_arg(list, int) - PICK(0, 3);
    va_end(list); return s;
}
SEPARATE int put(char *to, size_t size, const char *format, ...) {
    va_list list, again; va_start(list, format); va_copy(again, list);
    int n = vsnprintf(NULL, 0, format, again) + PICK(0, 100);
    vsnprintf(to, size, format, list); va_end(list); va_end(again); return n;
}
SEPARATE double caller(int n) { return sum("ididddddddddd", n, 1.5, 3, .25, 1., 2., 3., 4., 5., 6., 7., 8., 9.); }
void answer(int n) { char b[40]; COUNT; double s = caller(n);
    printf("%g %d %s", s, put(b, sizeof b, "%d-%g", n, .5), b); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "memory of the frame",
        r"""
#include <alloca.h>
SEPARATE int filled(char *p, int n) { memset(p, 'a' + n, n); return p[n / 2]; }
SEPARATE int with_alloca(int n) { char *p = alloca(n + PICK(10, 100)); return filled(p, n + 1) + PICK(0, 1); }
SEPARATE int with_array(int n) { int p[n + PICK(1, 5)]; for (int k = 0; k <= n; k++) p[k] = k * PICK(1, 2);
    return p[n]; }
SEPARATE int with_both(int n) { _Alignas(64) char a[128]; char b[n + 1]; b[n] = n;
    return filled(a, n + 1) + b[n] + PICK(2, 3); }
void answer(int n) { COUNT; printf("%d %d %d", with_alloca(n), with_array(n), with_both(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "assembly",
        r"""
static int counter = 1;
SEPARATE int act(int n) {
    int x = n, y;
    COUNT;
    __asm__ volatile("1: addl %2, %0; decl %1; jns 1b" : "+r"(x), "=&r"(y) : "i"(PICK(3, 5)), "1"(n) : "cc");
    __asm__ volatile("lock incl %0; negl %1; jmp 2f; .byte 0x0f, 0x1f, 0x00; 2: lock decl %0"
                     : "+m"(counter), "+r"(x) : : "cc");
    __asm__ volatile("movq %%fs:0, %%rax; pushq %%rax; popq %%rdx; rep; nop" : : : "rax", "rdx", "memory");
    return x + y + counter;
}
SEPARATE int after(int n) { counter += n; int x = counter; counter -= n; return x; }
void answer(int n) { printf("%d %d", act(n), after(n)); }
""",
        flags=("-mno-red-zone",),
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "nested functions",
        r"""
SEPARATE int each(int (*f)(int), int n) { int s = 0; for (int k = 0; k < n; k++) s += f(k); return s; }
SEPARATE int act(int n) {
    int seen = PICK(0, 100);
    int visit(int k) { seen += k; return k * PICK(2, 3) + n; }
    COUNT;
    return each(visit, n + 1) * 1000 + seen;
}
void answer(int n) { printf("%d", act(n)); }
""",
        fits=("gcc",),
        builds=(GCC, *PLAIN[:1]),
    ),
    Shape("a function of more than 64 KiB", LARGE, builds=USUAL, flags=("-O1",)),
    Shape(
        "many callers",
        r"""
SEPARATE int callee(int n) { return n + PICK(1, 2) + zero; }
#define F(k) SEPARATE static int f##k(int n) { return callee(n + k) * (k % 7 + 1) - k; }
#define G(k) F(k##0) F(k##1) F(k##2) F(k##3) F(k##4) F(k##5) F(k##6) F(k##7) F(k##8) F(k##9)
#define C(k) s += f##k(n);
#define D(k) C(k##0) C(k##1) C(k##2) C(k##3) C(k##4) C(k##5) C(k##6) C(k##7) C(k##8) C(k##9)
#define X(M) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15) M(16) M(17) M(18) M(19)
X(G)
SEPARATE int all(int n) { int s = 0; X(D) return s; }
SEPARATE int twice(int n) { COUNT; return callee(n) * PICK(2, 3); }
void answer(int n) { int s = all(n); printf("%d %d", s, twice(n)); }
""",
        builds=(GCC,),
    ),
    Shape(
        "constructors stay",
        r"""
static volatile int ready = 1;
__attribute__((constructor)) static void set_up(void) { ready += 41; atexit(abort); }
__attribute__((destructor)) static void tear_down(void) { ready = 0; }
void answer(int n) { COUNT; printf("%d %d", ready, n * PICK(1, 2)); }
""",
        builds=USUAL,
    ),
    Shape(
        "a constructor changes",
        r"""
static volatile int ready = 1;
__attribute__((constructor)) static void set_up(void) { ready += PICK(41, 42); }
void answer(int n) { COUNT; printf("%d %d", ready, n); }
""",
        builds=USUAL,
        refused=frozenset(("constructors",)),
    ),
    Shape(
        "a constructor more",
        r"""
static volatile int ready = 1;
__attribute__((constructor)) static void set_up(void) { ready += 41; }
#if VERSION > 1
__attribute__((constructor)) static void set_more(void) { ready *= 2; }
#endif
void answer(int n) { COUNT; printf("%d %d", ready, n); }
""",
        builds=(*USUAL, replace(GCC, flags=("-flto",))),
        refused=frozenset(("constructors",)),
    ),
    Shape(
        "weak symbols and aliases",
        r"""
__attribute__((weak)) int nowhere(int n);
__attribute__((weak, noinline)) int weak(int n) { return n + PICK(1, 2) + zero; }
SEPARATE int strong(int n) { printf(PICK("s ", "S ")); return n * 2; }
int alias(int n) __attribute__((alias("strong")));
static int (*chosen)(int);
SEPARATE int steady(int n) { return alias(n) + weak(n); }
void answer(int n) {
    COUNT;
    chosen = nowhere ? nowhere : n & 1 ? alias : strong;
    printf("%d %d %d", chosen(n), steady(n), chosen == strong);
}
""",
        builds=(*USUAL, *FIXED, *PLAIN),
    ),
    Shape(
        "functions change places",
        r"""
#define A SEPARATE int a(int n) { return n + 1 + zero; }
#define B SEPARATE int b(int n) { return n + PICK(2, 22) + zero; }
#define D SEPARATE int d(int n) { return a(n) + b(n); }
int a(int n); int b(int n); int d(int n);
#if VERSION == 1
A B D
#else
D B A
#endif
void answer(int n) { COUNT; printf("%d %d %d", a(n), b(n), d(n)); }
""",
        builds=(*USUAL, *SMALL),
    ),
    Shape(
        "equal functions change their order",
        r"""
static long x, y;
#define F(name, what, by) SEPARATE long name(int n) { what += n; long v = what * by; what -= n; return v; }
#if VERSION == 1
F(a, x, 3) F(b, y, 3) F(c, x, 5)
#else
F(b, y, 3) F(a, x, 3) F(c, x, 7)
#endif
SEPARATE void set(int n) { x = n; y = n * 10; }
void answer(int n) { COUNT; set(n); printf("%ld %ld %ld", a(n), b(n), c(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "another number of arguments",
        r"""
#if VERSION == 1
SEPARATE static int act(int a) { return a * 2 + zero; }
#define CALL(n) act(n)
#else
SEPARATE static int act(int a, int b) { return a * b + zero; }
#define CALL(n) act(n, 7)
#endif
SEPARATE int one(int n) { COUNT; return CALL(n); }
SEPARATE int two(int n) { return CALL(n + 1) ^ 1; }
void answer(int n) { int a = one(n); printf("%d %d", a, two(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "another number of arguments, with a pointer in live data",
        r"""
#if VERSION == 1
SEPARATE static int act(int a) { return a * 2 + zero; }
#define CALL(f, n) f(n)
static int (*kept)(int);
#else
SEPARATE static int act(int a, int b) { return a * b + zero; }
#define CALL(f, n) f(n, 7)
static int (*kept)(int, int);
#endif
SEPARATE void keep(void) { if (!kept) kept = act; }
void answer(int n) { COUNT; keep(); printf("%d", CALL(kept, n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
)
