"""Shapes of control that leaves the ordinary way: long jumps, signals, functions that never return."""

from __future__ import annotations

from tests.shapes.model import FIXED, MAIN, PLAIN, STATIC, USUAL, Shape

SHAPES = (
    Shape(
        "long jumps",
        r"""
#include <setjmp.h>
static jmp_buf back;
SEPARATE void fail(int n) { if (n > PICK(1, 2)) longjmp(back, n); printf("fine "); }
SEPARATE int steady(int n) { volatile int seen = n; int code = setjmp(back); if (code) return -code; fail(seen);
    return seen; }
SEPARATE int act(int n) {
    jmp_buf here; volatile int tries = 0;
    COUNT;
    int code = setjmp(here);
    if (tries++ < PICK(2, 3)) longjmp(here, tries);
    return code * 10 + tries;
}
void answer(int n) { int a = steady(n); printf("%d %d", a, act(n)); }
""",
        builds=(*USUAL, *PLAIN, *STATIC),
    ),
    Shape(
        "a long jump across the patch",
        r"""
#include <setjmp.h>
extern jmp_buf start;
void answer(int n) { COUNT; printf(PICK("%d", "%d!"), n); if (n & 1) longjmp(start, n + PICK(0, 100)); }
""",
        main=MAIN.replace("int main", "#include <setjmp.h>\njmp_buf start;\nint main").replace(
            "    while",
            "    int code = setjmp(start);\n"
            '    if (code) { printf(" back %d\\n", code); fflush(stdout); }\n'
            "    while",
        ),
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "signal handlers",
        r"""
#include <signal.h>
static volatile sig_atomic_t seen; static int installed;
static void handler(int number) { seen += PICK(1, 2); }
static void detailed(int number, siginfo_t *info, void *context) { seen += info->si_signo * PICK(10, 100); }
SEPARATE void install(void) {
    if (installed++) return;
    struct sigaction action = {.sa_sigaction = detailed, .sa_flags = SA_SIGINFO};
    signal(SIGUSR1, handler);
    sigaction(SIGUSR2, &action, NULL);
}
SEPARATE int same(void) {
    struct sigaction now;
    sigaction(SIGUSR1, NULL, &now);
    return now.sa_handler == handler;
}
void answer(int n) { COUNT; install(); seen = 0; raise(SIGUSR1); raise(SIGUSR2); printf("%d %d %d", seen, same(), n); }
""",
        builds=(*USUAL, *FIXED),
    ),
    Shape(
        "functions that never return",
        r"""
#include <setjmp.h>
static jmp_buf back;
__attribute__((noreturn)) SEPARATE static void leave(int n) { printf(PICK("leaving %d ", "gone %d "), n);
    longjmp(back, 1); }
__attribute__((noreturn)) SEPARATE static void stop(int n) { if (n == 77) exit(1); leave(n + PICK(0, 5)); }
SEPARATE int act(int n) { COUNT; if (n == 2) leave(n); if (n > 2) stop(n); return n; }
void answer(int n) { if (setjmp(back)) { printf("caught"); return; } printf("%d", act(n)); }
""",
        builds=(*USUAL, *PLAIN),
    ),
    Shape(
        "main changes",
        "void answer(int n) { COUNT; printf(PICK(\"%d\", \"%d!\"), n); }\n",
        main=MAIN.replace("    return 0;", "#if VERSION > 1\n    puts(\"bye\");\n#endif\n    return 0;"),
        builds=USUAL,
        busy=True,
    ),
    Shape(
        "calls that are made again and again while the program is patched",
        r"""
#include <pthread.h>
static volatile long beats; static volatile int started;
SEPARATE void beat(int n) { beats += PICK(1, 2); for (volatile int k = 0; k < n; k++); }
static void *loop(void *p) { for (;;) { beat(3); for (volatile int k = 0; k < 3000; k++); } return p; }
void answer(int n) {
    pthread_t thread;
    COUNT;
    if (!started++) pthread_create(&thread, NULL, loop, NULL);
    long before = beats;
    while (beats == before);
    printf("%s %d", beats > before ? "beats" : "stands still", n * PICK(1, 2));
}
""",
        flags=("-pthread",),
        builds=USUAL,
    ),
)  # fmt: skip
