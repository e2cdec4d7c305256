"""Shapes of branches through tables: switches and computed goto."""

from __future__ import annotations

from tests.shapes.model import FIXED, GUARDED, PLAIN, SMALL, STATIC, USUAL, Shape

ALL = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 40, 1000)
LABELS = frozenset(("label-table",))

DENSE = r"""
static long noted;
SEPARATE long act(int n) {
    COUNT;
    switch (n) {
    case 0: return noted + 17;
    case 1: noted++; puts("one"); return noted-- * 3;
    case 2: return n * PICK(5, 6);
    case 3: printf("three "); return 3;
    case 4: return served > 0;
    case 5: return n << 7;
    case 6: printf("%d ", n); return 66;
#if VERSION > 1
    case 7: return 77;
    case 8: printf("eight "); return n - 1;
    case 9: return n * n;
    case 10: return -n;
#endif
    default: return -1;
    }
}
void answer(int n) { if (n == 1) n = 0; printf("%ld", act(n)); }
"""

INTERPRETER = r"""
SEPARATE int run(const char *p) {
    static const void *const labels[] = {&&halt, &&add, &&dbl, &&neg};
    int x = 1;
    COUNT;
    goto *labels[(int)*p++ & 3];
add: x += PICK(3, 4); goto *labels[(int)*p++ & 3];
dbl: x *= 2; goto *labels[(int)*p++ & 3];
neg: x = -x; goto *labels[(int)*p++ & 3];
halt: return x;
}
void answer(int n) { char code[] = {1, 2, n & 3, 1, 3, 2, 1, 0}; printf("%d", run(code)); }
"""

THREADED = r"""
static LABEL code[8]; static int ready;
SEPARATE int run(int n) {
    static LABEL_CONST labels[] = {LABELS};
    int x = n;
    LABEL *p = code;
    COUNT;
    if (!ready) { for (int k = 0; k < 7; k++) code[k] = labels[(k + n) % 3 + 1]; code[7] = labels[0]; ready = 1; }
    NEXT;
add: x += PICK(3, 300000); NEXT;
dbl: x *= 2; NEXT;
neg: x = -x; NEXT;
halt: if (x == PICK(1, 77777)) puts(PICK("", "seven")); printf("%d", x); return x;
}
void answer(int n) { run(n); }
"""

SHAPES = (
    Shape("a dense switch grows", DENSE, ALL, builds=(*USUAL, *PLAIN, *FIXED, *STATIC, *GUARDED, *SMALL)),
    Shape(
        "a sparse switch grows",
        r"""
SEPARATE const char *act(int n) {
    COUNT;
    switch (n) {
    case 1: return "one"; case 40: return PICK("forty", "vierzig"); case 100: return "hundred"; case -7: return "minus";
    case 1000: return "thousand"; case 65536: return "big"; case 5: return "five"; case 7: return "seven";
#if VERSION > 1
    case 8: return "eight"; case 9: return "nine"; case 10: return "ten"; case 2000: return "two thousand";
#endif
    default: return "none";
    }
}
void answer(int n) { printf("%s", act(n)); }
""",
        (*ALL, 2000, -7, 65536),
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "a nested switch",
        r"""
SEPARATE int act(int a, int b) {
    COUNT;
    switch (a) {
    case 0: switch (b) { case 0: return 1; case 1: return printf("x"); case 2: return 33; case 3: return b + 1;
                         case 4: return PICK(9, 90); case 5: return 10; default: return 11; }
    case 1: return served > 9 ? 12 : 12; case 2: printf("two "); return 13; case 3: return 14 * b;
    case 4: switch (b) { case 0: return 21; case 1: return 22 ^ a; case 2: return printf("yy"); case 3: return 24;
#if VERSION > 1
                         case 4: return 25; case 5: return 26;
#endif
                         default: return 27; }
    case 5: return 15; case 6: return b; default: return 16;
    }
}
void answer(int n) { printf("%d", act(n / 6, n % 6)); }
""",
        (0, 1, 2, 3, 4, 5, 8, 12, 20, 24, 25, 26, 27, 28, 29, 33, 40),
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "switches over char and long",
        r"""
SEPARATE int letter(char c) {
    switch (c) { case 'a': return 1; case 'b': return printf("b"); case 'c': return 3; case 'd': return PICK(4, 40);
                 case 'e': return 5 * c; case 'f': return 6; case 'g': return printf("gg"); default: return 0; }
}
SEPARATE int number(long n) {
    switch (n) { case 1L << 40: return 1; case (1L << 40) + 1: return 2; case (1L << 40) + 2: return printf("z");
                 case (1L << 40) + 3: return PICK(4, 44); case (1L << 40) + 4: return 5; case (1L << 40) + 5: return n;
#if VERSION > 1
                 case (1L << 40) + 6: return 7;
#endif
                 default: return -1; }
}
void answer(int n) { COUNT; printf("%d %d", letter('a' + n), number((1L << 40) + n)); }
""",
        ALL,
        builds=(*USUAL, *SMALL),
    ),
    Shape(
        "a switch that unchanged code makes, with changed text",
        r"""
SEPARATE const char *text(int n) {
    COUNT;
    switch (n) { case 0: return "null"; case 1: return "eins"; case 2: return PICK("zwo", "zwei");
    case 3: return "drei";
                 case 4: return "vier"; case 5: return PICK("funf", "fuenf"); case 6: return "sechs";
    default: return "?"; }
}
void answer(int n) { printf("%s", text(n)); }
""",
        ALL,
        builds=(*USUAL, *PLAIN, *FIXED),
    ),
    Shape(
        "a switch of unchanged code beside one that grew",
        r"""
SEPARATE int steady(int n) {
    switch (n) { case 0: return printf("s"); case 1: return 6; case 2: return printf("st"); case 3: return served * 0;
                 case 4: return n * 9; case 5: return printf("ste"); default: return 1; }
}
"""
        + DENSE.replace('printf("%ld", act(n))', 'printf("%ld %d", act(n), steady(n))'),
        ALL,
        builds=(*USUAL, *FIXED),
    ),
    Shape("computed goto", INTERPRETER, builds=USUAL, refused=LABELS),
    Shape("computed goto, lifted", INTERPRETER, builds=(*USUAL, *GUARDED), allow=LABELS),
    Shape(
        "labels in live data",
        THREADED.replace("LABEL_CONST", "const void *const").replace("LABELS", "&&halt, &&add, &&dbl, &&neg")
        .replace("LABEL", "const void *").replace("NEXT", "goto **p++"),
        builds=(*USUAL, *FIXED, *PLAIN),
        refused=LABELS,
    ),
    Shape(
        "distances of labels in live data",
        THREADED.replace("LABEL_CONST", "const int")
        .replace("LABELS", "&&halt - &&halt, &&add - &&halt, &&dbl - &&halt, &&neg - &&halt")
        .replace("LABEL", "int").replace("NEXT", "goto *(&&halt + *p++)"),
        builds=(*USUAL, *FIXED, *PLAIN),
        refused=LABELS,
    ),
)  # fmt: skip
