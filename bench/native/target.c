/* The program that is patched while the pause is measured:  target SHARED THREADS SPINNING

   A probe thread, created first and running at nice -20, asks for the time again and again and notes every gap in
   SHARED: what a thread of the program sees of a pause. THREADS counts the others, the main thread included; SPINNING of
   them compute without end, the others sleep, each on about 7 KB of used stack, and wake up ten times a second to
   call one of the functions. The main thread answers on its standard input:

       time N COUNT   the nanoseconds that COUNT calls of function N take, and of as many turns without a call
       call N         what function N answers

   functions.c, which is generated, has the functions. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define GAPS 65536
#define SHORTEST_GAP 5000 /* ns; a read of the clock takes 30, an interrupt a few thousand */
#define FRAMES 6
#define FRAME 1024

extern long (*const functions[])(long);
extern const long function_count;

static struct shared {
    uint64_t gaps; /* how many were noted; the last GAPS of them are kept */
    uint64_t awake; /* threads that have started */
    struct { uint64_t from, to; } gap[GAPS]; /* ns of CLOCK_MONOTONIC */
} *shared;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void started(void) { __atomic_fetch_add(&shared->awake, 1, __ATOMIC_SEQ_CST); }

static void *probe(void *unused) {
    (void)unused;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), -20);
    started();
    for (uint64_t last = now();;) {
        uint64_t time = now();
        if (time - last > SHORTEST_GAP) {
            uint64_t next = shared->gaps;
            shared->gap[next % GAPS].from = last;
            shared->gap[next % GAPS].to = time;
            __atomic_store_n(&shared->gaps, next + 1, __ATOMIC_RELEASE);
        }
        last = time;
    }
    return NULL;
}

static volatile long sink;

static void sleep_and_call(long number) {
    struct timespec tenth = {0, 100000000};
    for (long turn = number; turn >= 0; turn++) { /* without end, but gcc must not know */
        nanosleep(&tenth, NULL);
        sink = functions[turn % function_count](turn);
    }
}

static __attribute__((noinline)) int on_used_stack(int frames, long number) {
    volatile char frame[FRAME];
    memset((char *)frame, frames, sizeof frame);
    if (frames > 0)
        return on_used_stack(frames - 1, number) + frame[1];
    sleep_and_call(number);
    return frame[1];
}

static void *sleeper(void *number) {
    started();
    on_used_stack(FRAMES, (long)number);
    return NULL;
}

static void *spinner(void *unused) {
    (void)unused;
    started();
    for (volatile uint64_t turns = 0;; turns++)
        ;
    return NULL;
}

static void start(void *(*body)(void *), long number) {
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    if (pthread_create(&thread, &attributes, body, (void *)number) != 0)
        abort();
}

static void measure(long number, long count) {
    long (*function)(long) = functions[number];
    long value = 0;
    uint64_t begin = now();
    for (long turn = 0; turn < count; turn++)
        value = function(value);
    uint64_t calls = now() - begin;
    begin = now();
    for (long turn = 0; turn < count; turn++)
        __asm__ volatile("" : "+r"(value));
    uint64_t turns = now() - begin;
    sink = value;
    printf("%lu %lu\n", calls, turns);
}

int main(int count, char **words) {
    if (count != 4)
        return 2;
    long threads = atol(words[2]), spinning = atol(words[3]);
    int file = open(words[1], O_RDWR);
    if (file < 0 || ftruncate(file, sizeof *shared) != 0)
        return 1;
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED)
        return 1;
    close(file);
    start(probe, 0);
    for (long number = 1; number < threads; number++)
        start(number <= spinning ? spinner : sleeper, number);
    while (__atomic_load_n(&shared->awake, __ATOMIC_SEQ_CST) < (uint64_t)threads)
        usleep(1000);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    long number, calls;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "time %ld %ld", &number, &calls) == 2)
            measure(number, calls);
        else if (sscanf(line, "call %ld", &number) == 1)
            printf("%ld\n", functions[number](1));
        else
            return 2;
    }
    return 0;
}
