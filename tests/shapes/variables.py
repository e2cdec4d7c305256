"""Shapes of data that lives: globals, static locals, bit fields, atomics."""

from __future__ import annotations

from dataclasses import replace

from tests.shapes.model import FIXED, PLAIN, SMALL, STATIC, USUAL, Shape

SHAPES = (
    Shape(
        "static locals",
        r"""
SEPARATE int tick(int n) {
    static int calls; static char text[24]; static long sums[3] = {1, 2, 3};
    COUNT; calls++; sums[n % 3] ^= n;
    snprintf(text, sizeof text, PICK("%d/%ld", "%d:%ld"), n, sums[1]);
    sums[n % 3] ^= n;
    printf("%s %s ", text, calls == served ? "ok" : "lost");
    return PICK(1, 2);
}
SEPARATE int tock(int n) { static int calls = 5; static char text[24]; text[0] = n;
    return ++calls > 5 && text[0] == n; }
void answer(int n) { int a = tick(n); printf("%d %d", a, tock(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "static locals that the large code model reaches from the table of offsets",
        r"""
SEPARATE int tick(int n) {
    static int calls; static char text[24]; static long sums[3] = {1, 2, 3};
    COUNT; calls++; sums[n % 3] ^= n;
    snprintf(text, sizeof text, PICK("%d/%ld", "%d:%ld"), n, sums[1]);
    sums[n % 3] ^= n;
    printf("%s %s ", text, calls == served ? "ok" : "lost");
    return PICK(1, 2);
}
SEPARATE int tock(int n) { static int calls = 5; static char text[24]; text[0] = n;
    return ++calls > 5 && text[0] == n; }
void answer(int n) { int a = tick(n); printf("%d %d", a, tock(n)); }
""",
        builds=(replace(USUAL[0], flags=("-mcmodel=large",)),),
        refused=frozenset(("unpinned-address",)),
    ),
    Shape(
        "same names in two files",
        r"""
static long total = 100; static const char *const tag = PICK("main", "first");
SEPARATE static long add(int n) { total += n; return total; }
long other(int n);
void answer(int n) { COUNT; long a = add(n), b = other(n); printf("%s %ld %ld %d", tag, a, b, PICK(1, 2)); add(-n); }
""",
        files={
            "other.c": r"""
static long total = 200; static const char *const tag = "other";
SEPARATE static long add(int n) { total += n * PICK(2, 3); return total; }
long other(int n) { long x = add(n); add(-n); return x + tag[0]; }
"""
        },
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "a new variable",
        r"""
static long first = 3, second; static char text[40];
#if VERSION > 1
static long fresh = 70; static int many[9];
#endif
SEPARATE long use(int n) {
    COUNT; first ^= n; second += n;
#if VERSION > 1
    many[n % 9]++; fresh++; first += 0 * many[n % 9];
#endif
    snprintf(text, sizeof text, "%ld", first);
    first ^= n;
    return strlen(text) + PICK(0, 50);
}
SEPARATE long look(void) { return second - second + first + text[30]; }
SEPARATE long reset(int n) { second -= n; return second; }
void answer(int n) { long a = use(n); printf("%ld %ld %ld", a, look(), reset(n)); }
""",
        builds=USUAL,
        refused=frozenset(("unpinned-address",)),
    ),
    Shape(
        "a new variable, by its name",
        r"""
static long first = 3, second; static char text[40];
#if VERSION > 1
static long fresh = 70; static int many[9];
#endif
SEPARATE long use(int n) {
    COUNT; first ^= n; second += n;
#if VERSION > 1
    many[n % 9]++; fresh++; first += 0 * many[n % 9];
#endif
    snprintf(text, sizeof text, "%ld", first);
    first ^= n;
    return strlen(text) + PICK(0, 50);
}
SEPARATE long look(void) { return second - second + first + text[30]; }
SEPARATE long reset(int n) { second -= n; return second; }
void answer(int n) { long a = use(n); printf("%ld %ld %ld", a, look(), reset(n)); }
""",
        builds=tuple(replace(build, stripped=False) for build in USUAL),
        warned=frozenset(("new-variable",)),
    ),
    Shape(
        "a variable less",
        r"""
static int first; static long second = 9;
#if VERSION == 1
static long gone = 1; static int idle[5];
#endif
static int third = 4;
SEPARATE int use(int n) {
    COUNT;
#if VERSION == 1
    gone += n; idle[n % 5]--;
#endif
    first += n; third ^= n;
    return first * PICK(2, 3);
}
SEPARATE int back(int n) { first -= n; third ^= n; second++; return third; }
void answer(int n) { int a = use(n); printf("%d %d", a, back(n)); }
""",
        builds=USUAL,
    ),
    Shape(
        "moved variables",
        r"""
#if VERSION == 1
static char a[3]; static long b = 1; static int c[7]; static short d = 2; static double e = 1.5; static char *f = "f";
#else
static char *f = "f"; static double e = 1.5; static int c[7]; static short d = 2; static char a[3]; static long b = 1;
#endif
SEPARATE double put(int n) { a[n % 3]++; b += n; c[n % 7] ^= n; d++; e *= 2; return a[n % 3] + b + c[n % 7] + d + e; }
SEPARATE void take(int n) { a[n % 3]--; b -= n; c[n % 7] ^= n; d--; e /= 2; }
SEPARATE double seen(int n) { return a[0] + b * 3 + c[1] + d + e + *f + n * PICK(1, 2); }
void answer(int n) { COUNT; double x = put(n), y = seen(n); take(n); printf("%g %g %g", x, y, seen(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "another initial value",
        r"""
static int level = PICK(3, 4);
SEPARATE int get(void) { return level; }
SEPARATE void set(int n) { level += n; }
void answer(int n) { COUNT; set(n); printf(PICK("%d is", "%d was"), get()); set(-n); }
""",
        builds=(*USUAL, *FIXED),
        refused=frozenset(("initial-value",)),
    ),
    Shape(
        "another initial value, lifted: the running value stays",
        r"""
static int level = PICK(3, 4);
SEPARATE int get(void) { return level; }
SEPARATE void set(int n) { level += n; }
void answer(int n) { COUNT; set(n); printf(PICK("%d is", "%d was"), get()); set(-n); }
""",
        builds=USUAL,
        allow=frozenset(("initial-value",)),
        warned=frozenset(("initial-value",)),
        after={0: "3 was", 1: "4 was", 2: "5 was", 5: "8 was"},
    ),
    Shape(
        "another initial value, of what only changed code uses",
        r"""
static int level = PICK(30, 40); static int other = 1;
void answer(int n) { COUNT; level += n; printf(PICK("%d is %d", "%d was %d"), level, other); level -= n; }
SEPARATE void steady(int n) { other += n; }
void (*use)(int) = steady;
""",
        builds=(*USUAL, *PLAIN),
        refused=frozenset(("initial-value",)),
    ),
    Shape(
        "bit fields",
        r"""
static struct { unsigned a : 3, b : 5, c : 9; int d : 6; unsigned long e : 40; } bits = {1, 2, 3, -4, 5};
SEPARATE void set(int n) { bits.a = n; bits.b = n * PICK(2, 3); bits.c += n; bits.d = -n; bits.e += PICK(1, 2); COUNT; }
SEPARATE void undo(int n) { bits.c -= n; bits.e = 5; }
void answer(int n) { set(n); printf("%d %d %d %d %ld", bits.a, bits.b, bits.c, bits.d, (long)bits.e); undo(n); }
""",
        builds=(*USUAL, *SMALL),
    ),
    Shape(
        "atomics",
        r"""
#include <stdatomic.h>
static atomic_long hits; static atomic_int flag = 1; static _Atomic(char *) where = "start";
SEPARATE long hit(int n) {
    long was = atomic_fetch_add(&hits, PICK(1, 2) * n);
    int one = 1;
    atomic_compare_exchange_strong(&flag, &one, PICK(2, 3));
    atomic_exchange(&where, PICK("old", "new"));
    return was + atomic_load(&flag);
}
SEPARATE void calm(void) { atomic_store(&hits, 0); atomic_store(&flag, 1); }
void answer(int n) { COUNT; hit(n); printf("%ld %s", hit(n), where); calm(); }
""",
        builds=USUAL,
    ),
    Shape(
        "structures by value",
        r"""
struct pair { int a, b; }; struct mixed { double x; long y; }; struct large { long v[9]; };
union either { double d; long l; };
static struct large kept = {{1, 2, 3, 4, 5, 6, 7, 8, 9}};
SEPARATE struct pair swap(struct pair p) { return (struct pair){p.b * PICK(1, 2), p.a}; }
SEPARATE struct mixed mix(struct mixed m, int n) { m.x += n * PICK(.5, .25); m.y ^= n; return m; }
SEPARATE struct large grow(struct large s, int n) { s.v[n % 9] += PICK(10, 20); kept.v[0] = 1; return s; }
SEPARATE union either cast(double d) { return (union either){.d = d + PICK(0, 1)}; }
void answer(int n) {
    struct pair p = swap((struct pair){n, n + 1});
    struct mixed m = mix((struct mixed){n, 3}, n);
    struct large s = grow(kept, n);
    COUNT;
    printf("%d %d %g %ld %ld %lx", p.a, p.b, m.x, m.y, s.v[n % 9], cast(n).l);
}
""",
        builds=(*USUAL, *PLAIN, *STATIC),
    ),
    Shape(
        "a pointer to a changed structure's table in live data",
        r"""
struct command { const char *name; int cost; };
static struct command commands[4] = {{"get", 1}, {"set", 2}, {PICK("del", "unlink"), 3}, {NULL, 0}};
static struct command *last;
SEPARATE struct command *find(int n) { return last = &commands[n % 3]; }
void answer(int n) { COUNT; find(n); printf("%s %d", last->name, last->cost + PICK(0, 1)); }
""",
        builds=USUAL,
        refused=frozenset(("initial-value",)),
    ),
    Shape(
        "buffers",
        r"""
static char line[64]; static char *end = line + sizeof line; static unsigned char map[256]; static wchar_t *nothing;
SEPARATE int put(const char *s) {
    char *p = line;
    while (*s && p != end - 1) *p++ = *s++ + PICK(0, 1);
    *p = 0;
    map[(unsigned char)line[0]]++;
    return p - line;
}
SEPARATE int used(void) { int n = 0; for (unsigned k = 0; k < sizeof map; k++) n += map[k] != 0; return n && !nothing; }
void answer(int n) { COUNT; char text[12]; sprintf(text, "%d", n); int k = put(text);
    printf("%d %s %d", k, line, used()); }
""",
        builds=(*USUAL, *FIXED),
    ),
)
