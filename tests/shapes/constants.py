"""Shapes of constant data: strings, numbers, vectors, tables."""

from __future__ import annotations

from tests.shapes.model import CLANG, FIXED, GCC, GUARDED, PLAIN, SMALL, STATIC, USUAL, WIDE, Shape

SHAPES = (
    Shape(
        "strings",
        r"""
SEPARATE const char *name(int n) { return n > 1 ? PICK("many", "a lot of them") : n ? "one" : PICK("none", "no"); }
void answer(int n) { COUNT; printf("%s %d", name(n), n); }
""",
        builds=(*USUAL, *STATIC, *GUARDED),
    ),
    Shape(
        "formats",
        r"""
SEPARATE void show(int n, const char *what) { COUNT; printf(PICK("%d of %s", "%2$s: %1$05d"), n, what); }
void answer(int n) { show(n * 3, n & 1 ? "odd" : "even"); }
""",
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "string tails",
        r"""
SEPARATE const char *tail(int n) { return n & 1 ? "phabet" : PICK("zeta", "bet"); }
SEPARATE const char *whole(int n) { return n & 1 ? "alphabet" : PICK("xyzeta", "sherbet"); }
void answer(int n) { COUNT; printf("%s %s %s", tail(n), whole(n), whole(n + 1)); }
""",
        builds=USUAL,
    ),
    Shape(
        "floats",
        r"""
SEPARATE double scaled(int n) { return n * PICK(1.5, 2.25) + PICK(0.1, 0.3); }
SEPARATE float third(int n) { return n / PICK(3.0f, 7.0f) - 0.5f; }
SEPARATE long double longer(int n) { return n * PICK(1.1L, 1.3L) + 0.7L; }
SEPARATE double steady(int n) { return n * 1.5 + 0.1; }
SEPARATE double turned(double x) { return -x * PICK(1.0, 3.0) + __builtin_fabs(x - 2); }
void answer(int n) {
    COUNT;
    printf("%.17g %.9g %.20Lg %.17g %.17g", scaled(n), third(n), longer(n), steady(n), turned(n));
}
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "one constant less",
        r"""
SEPARATE double area(int n) { return n * 3.14159; }
SEPARATE double edge(int n) { return n * PICK(2.71828, 3.14159); }
void answer(int n) { COUNT; printf("%.17g %.17g", area(n), edge(n)); }
""",
        builds=USUAL,
    ),
    Shape(
        "vectors",
        r"""
typedef int four __attribute__((vector_size(16)));
typedef double quad __attribute__((vector_size(32)));
typedef int words __attribute__((vector_size(32)));
static four mask = {1, -1, 1, -1};
SEPARATE int small(int n) {
    four a = {n, n + 1, n + 2, n + 3};
    a = a * PICK(((four){1, 2, 3, 4}), ((four){4, 3, 2, 9})) + mask;
    return a[0] + a[1] * 2 + a[2] * 3 + a[3] * 4;
}
SEPARATE double large(int n) {
    quad a = {n, n + .5, n + 1, n + 2};
    a = a * PICK(((quad){1, 2, 3, 4}), ((quad){.25, 3, 2, 9})) - (quad){0, 1, 0, 1};
    return a[0] + a[1] * 2 + a[2] * 3 + a[3];
}
SEPARATE int steady(int n) {
    words a = {n, n, n, n, 1, 2, 3, n};
    a = a * (words){1, 2, 3, 4, 5, 6, 7, 8};
    return a[0] + a[3] + a[4] + a[7];
}
SEPARATE int summed(const int *p) { int s = 0; for (int k = 0; k < 32; k++) s += p[k] * PICK(3, 5) + k; return s; }
void answer(int n) {
    int p[32];
    for (int k = 0; k < 32; k++) p[k] = n ^ k;
    COUNT;
    printf("%d %g %d %d", small(n), large(n), steady(n), summed(p));
}
""",
        builds=(*USUAL, *WIDE),
    ),
    Shape(
        "wide characters",
        r"""
#include <uchar.h>
#include <wchar.h>
SEPARATE const wchar_t *wide(int n) { return n & 1 ? L"one\x2022" : PICK(L"alpha\x263a", L"omega \x263b and more"); }
SEPARATE const char16_t *utf16(int n) { return n & 1 ? u"x\x2022" : PICK(u"ab\x263a", u"cde\x263b"); }
SEPARATE const char32_t *utf32(int n) { return n & 1 ? U"y\x2022" : PICK(U"fg\x1f600", U"hij\x1f601"); }
void answer(int n) {
    unsigned long sum = 0;
    COUNT;
    for (const wchar_t *p = wide(n); *p; p++) sum = sum * 31 + *p;
    for (const char16_t *p = utf16(n); *p; p++) sum = sum * 31 + *p;
    for (const char32_t *p = utf32(n); *p; p++) sum = sum * 31 + *p;
    printf("%lu", sum);
}
""",
        builds=(*USUAL, *SMALL),
    ),
    Shape(
        "a table that unchanged code reads",
        r"""
static const int prices[8] = {3, 5, PICK(7, 11), 9, 11, PICK(13, 17), 15, 17};
static const int steady[8] = {8, 7, 6, 5, 4, 3, 2, 1};
SEPARATE int price(int n) { COUNT; return prices[n & 7]; }
SEPARATE int other(int n) { return steady[n & 7]; }
void answer(int n) { printf("%d %d", price(n), other(n)); }
""",
        builds=(*USUAL, *FIXED, *STATIC),
    ),
    Shape(
        "a table that grows and is read up to its end mark",
        r"""
static const int weights[] = {2, 3, 5, PICK(7, 8),
#if VERSION > 1
    11, 13, 17, 19, 23,
#endif
    0};
static const char *const names[] = {"zero", "one", PICK("two", "zwei"),
#if VERSION > 1
    "three", "four", "five",
#endif
    NULL};
SEPARATE int total(void) { int sum = 0; for (const int *p = weights; *p; p++) sum += *p; return sum; }
SEPARATE const char *named(int n) { for (int k = 0; names[k]; k++) if (k == n) return names[k]; return "?"; }
void answer(int n) { COUNT; printf("%d %s", total(), named(n)); }
""",
        builds=(*USUAL, *PLAIN, *SMALL),
    ),
    Shape(
        "a table of structures",
        r"""
struct item { const char *name; double weight; short code; char mark; };
static const struct item items[] = {
    {"apple", 1.5, 3, 'a'}, {"pear", PICK(2.5, 2.75), 4, 'p'}, {PICK("plum", "prune"), .5, PICK(5, 6), 'q'},
    {"fig", .25, 7, PICK('f', 'F')},
};
SEPARATE const struct item *find(int n) { return &items[n & 3]; }
void answer(int n) { const struct item *i = find(n); COUNT;
    printf("%s %g %d %c", i->name, i->weight, i->code, i->mark); }
""",
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "a constant that is known by its address",
        r"""
static const char idle[] = "idle", busy[] = "busy";
static const char *state = idle;
SEPARATE void toggle(void) { state = state == idle ? busy : idle; }
SEPARATE void report(int n) {
    COUNT;
    printf(PICK("%s, %s %d", "%s; %s; %d"), state == idle ? "rests" : "works", state, n);
}
void answer(int n) { toggle(); report(n); toggle(); }
""",
        builds=(*USUAL, *PLAIN, *FIXED),
    ),
    Shape(
        "a constant that only changed code knows by its address",
        r"""
static const long mark[3] = {1, 2, 3};
static const long *seen;
SEPARATE void report(int n) {
    COUNT;
    if (!seen) { seen = mark; printf(PICK("first ", "the first ")); }
    else printf(seen == mark ? PICK("same ", "the same ") : PICK("other ", "another "));
    printf("%ld %d", seen[n % 3], n);
}
void answer(int n) { report(n); }
""",
        questions=(0, 1, 0, 2),
        builds=(*USUAL, *PLAIN, *FIXED),
        refused=frozenset(("constant-identity",)),
    ),
    Shape(
        "a constant that code knows by its address while other things change",
        r"""
static const long mark[3] = {1, 2, 3};
static const long *seen;
SEPARATE void report(int n) {
    COUNT;
    if (!seen) { seen = mark; printf("first "); }
    else printf(seen == mark ? "same " : "other ");
    if (n > PICK(100, 200)) puts("much");
    printf("%ld %d", seen[n % 3], n * PICK(1, 7) + PICK(0, 5));
}
void answer(int n) { report(n); }
""",
        questions=(0, 1, 0, 2),
        after={0: "same 1 5"},
        builds=PLAIN,
    ),
    Shape(
        "operations that are known by their address",
        r"""
struct operations { int (*open)(int); int (*close)(int); const char *name; };
SEPARATE static int up(int n) { return n + PICK(1, 2) + zero; }
SEPARATE static int down(int n) { return n - 1 + zero; }
SEPARATE static int away(int n) { return n * 10 + zero; }
static const struct operations plain = {up, down, "plain"}, odd = {down, up, "odd"};
static const struct operations *chosen[2];
SEPARATE void choose(void) { if (!chosen[0]) { chosen[0] = &plain; chosen[1] = &odd; } }
SEPARATE const char *kind(int n) { return chosen[n & 1] == &odd ? "odd" : chosen[n & 1] == &plain ? "plain" : "lost"; }
void answer(int n) {
    choose();
    COUNT;
    printf("%s %d %d", kind(n), chosen[n & 1]->open(n), chosen[n & 1]->close(n));
}
""",
        builds=USUAL,
    ),
    Shape(
        "changed operations that are known by their address",
        r"""
struct operations { int (*open)(int); int (*close)(int); const char *name; };
SEPARATE static int up(int n) { return n + PICK(1, 2) + zero; }
SEPARATE static int down(int n) { return n - 1 + zero; }
SEPARATE static int away(int n) { return n * 10 + zero; }
static const struct operations plain = {up, down, "plain"}, odd = {down, PICK(up, away), "odd"};
static const struct operations *chosen[2];
SEPARATE void choose(void) { if (!chosen[0]) { chosen[0] = &plain; chosen[1] = &odd; } }
SEPARATE const char *kind(int n) { return chosen[n & 1] == &odd ? "odd" : chosen[n & 1] == &plain ? "plain" : "lost"; }
void answer(int n) {
    choose();
    COUNT;
    printf("%s %d %d", kind(n), chosen[n & 1]->open(n), chosen[n & 1]->close(n));
}
""",
        builds=(*USUAL, *FIXED, *PLAIN),
        refused=frozenset(("constant-identity",)),
    ),
    Shape(
        "a distance from the beginning of a changed table",
        r"""
struct command { const char *name; int cost; };
static const struct command commands[] = {{"get", 1}, {"set", 2}, {"del", PICK(3, 4)}, {"inc", 4}};
static const struct command *last;
SEPARATE const struct command *find(int n) { if (!last) last = &commands[n & 3]; return &commands[n & 3]; }
SEPARATE long number(const struct command *c) { return c - commands; }
void answer(int n) {
    COUNT;
    const struct command *c = find(n);
    printf("%ld %ld %s %d", number(c), number(last), c->name, c->cost);
}
""",
        builds=(*USUAL, *FIXED),
        refused=frozenset(("constant-identity",)),
    ),
    Shape(
        "loops up to the end of a table",
        r"""
static const int changed[9] = {1, 2, 3, PICK(4, 5), 5, 6, 7, 8, 9}, steady[9] = {9, 8, 7, 6, 5, 4, 3, 2, 1};
#define SUM(name, table) SEPARATE int name(int n) { \
    int s = 0; \
    for (const int *p = table; p != table + 9; p++) { s = s * 3 + *p; if (s > 100000) printf("."); } \
    return s + n; }
SUM(first, changed)
SUM(second, steady)
void answer(int n) { COUNT; printf("%d ", first(n)); printf("%d", second(n)); }
""",
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "switches that choose a value",
        r"""
SEPARATE const char *text(int n) {
    switch (n) { case 0: return "a0"; case 1: return "b1"; case 2: return "c2"; case 3: return PICK("d3", "DDD");
                 case 4: return "e4"; case 5: return "f5"; default: return "g"; }
}
SEPARATE double real(int n) {
    switch (n) { case 0: return 1.5; case 1: return 2.5; case 2: return PICK(3.5, 3.25); case 3: return 9;
                 case 4: return 7; case 5: return .125; default: return 0; }
}
SEPARATE int whole(int n) {
    switch (n) { case 0: return 11; case 1: return 25; case 2: return PICK(35, 325); case 3: return 9;
                 case 4: return 7777; case 5: return 125; default: return 0; }
}
void answer(int n) { COUNT; printf("%s %g %d", text(n), real(n), whole(n)); }
""",
        questions=(0, 1, 2, 3, 4, 5, 6),
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "initial values of locals",
        r"""
struct wide { int v[12]; const char *n; };
SEPARATE int first(int n) {
    struct wide x = {{1, 2, 3, 4, 5, 6, 7, 8, 9, PICK(10, 20), 11, 12}, PICK("x", "yy")};
    int s = 0;
    x.v[n % 12] += n;
    for (int k = 0; k < 12; k++) s = s * 3 + x.v[k];
    return s + strlen(x.n);
}
SEPARATE int second(int n) {
    int y[8] = {3, 1, 4, 1, 5, 9, 2, 6}, s = 0;
    y[n & 7]++;
    for (int k = 0; k < 8; k++) s = s * 5 + y[k];
    return s;
}
void answer(int n) { COUNT; printf("%d %d", first(n), second(n)); }
""",
        builds=(*USUAL, *WIDE),
    ),
    Shape(
        "wide integers",
        r"""
typedef unsigned __int128 huge;
static huge kept = ((huge)7 << 64) + 9;
SEPARATE huge grown(int n) { COUNT; kept += n; return kept * PICK(3, 5) / (n + PICK(7, 9)) + ((huge)PICK(1, 2) << 70); }
void answer(int n) { huge x = grown(n); kept -= n; printf("%llx %llx", (long long)(x >> 64), (long long)x); }
""",
        builds=(*USUAL, GCC, *PLAIN),
    ),
    Shape(
        "only line numbers",
        r"""
#include <assert.h>
#if VERSION > 1



#endif
SEPARATE int checked(int n) { assert(n >= 0); return n; }
SEPARATE int twice(int n) { assert(n < 1000000); return n * 2; }
void answer(int n) { COUNT; printf("%d %d", checked(n), twice(n)); }
""",
        builds=(GCC, CLANG),
        nothing=True,
    ),
)
