/* The pause as a C program would make it, with the system calls that a patcher cannot do without: what the pause of
   livegraft is measured by.  floor PID

   Reads from its standard input the number of forbidden ranges and each range, the number of writes and each write as an
   address and the number of bytes there, which are written back as they are. Then, for every further line, it makes a
   pause and says how it went: the first PTRACE_INTERRUPT and the last PTRACE_DETACH in ns of CLOCK_MONOTONIC, and the words
   of stacks found in forbidden ranges. Everything that can be done before the pause is. It is no patcher: it unwinds
   nothing, looks for no new threads, repairs no interrupted call and checks no answer but its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <dirent.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 1024 /* UIO_MAXIOV, too: one call reads all stacks */
#define MAPPINGS 65536
#define WORDS (16 << 20 >> 3)
#define PRIORITY 10

struct range { uint64_t start, end; };
struct write { uint64_t address; size_t size; char *bytes; };

static pid_t pid, tids[THREADS];
static int threads, mappings, ranges, writes, memory;
static struct range mapping[MAPPINGS], *range;
static struct write *written;
static int signals[THREADS];
static struct user_regs_struct registers[THREADS];
static struct iovec remote[THREADS];
static uint64_t words[WORDS];

static void fail(const char *what) {
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void read_plan(void) {
    if (scanf("%d", &ranges) != 1)
        fail("ranges");
    range = calloc((size_t)ranges, sizeof *range);
    for (int i = 0; i < ranges; i++)
        if (scanf("%lu %lu", &range[i].start, &range[i].end) != 2)
            fail("a range");
    if (scanf("%d", &writes) != 1)
        fail("writes");
    written = calloc((size_t)writes, sizeof *written);
    for (int i = 0; i < writes; i++) {
        struct write *one = &written[i];
        if (scanf("%lu %zu", &one->address, &one->size) != 2)
            fail("a write");
        one->bytes = malloc(one->size);
    }
}

static void read_mappings(void) {
    char name[64], line[4096];
    snprintf(name, sizeof name, "/proc/%d/maps", pid);
    FILE *file = fopen(name, "r");
    if (!file)
        fail(name);
    for (mappings = 0; mappings < MAPPINGS && fgets(line, sizeof line, file); mappings++)
        if (sscanf(line, "%lx-%lx", &mapping[mappings].start, &mapping[mappings].end) != 2)
            fail(line);
    fclose(file);
}

static void seize_all(void) {
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/task", pid);
    DIR *folder = opendir(name);
    if (!folder)
        fail(name);
    threads = 0;
    for (struct dirent *entry; (entry = readdir(folder)) && threads < THREADS;)
        if (entry->d_name[0] != '.') {
            tids[threads] = atoi(entry->d_name);
            if (ptrace(PTRACE_SEIZE, tids[threads++], 0, 0))
                fail("PTRACE_SEIZE");
        }
    closedir(folder);
}

static void stop_all(void) {
    for (int i = 0; i < threads; i++)
        if (ptrace(PTRACE_INTERRUPT, tids[i], 0, 0))
            fail("PTRACE_INTERRUPT");
    for (int i = 0; i < threads; i++) {
        int status;
        if (waitpid(tids[i], &status, __WALL) != tids[i] || !WIFSTOPPED(status))
            fail("waitpid");
        signals[i] = status >> 16 ? 0 : WSTOPSIG(status);
    }
    for (int i = 0; i < threads; i++)
        if (ptrace(PTRACE_GETREGS, tids[i], 0, &registers[i]))
            fail("PTRACE_GETREGS");
}

static uint64_t end_of_stack(uint64_t pointer) {
    int low = 0, high = mappings;
    while (low < high) {
        int middle = (low + high) / 2;
        if (mapping[middle].end <= pointer)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == mappings || pointer < mapping[low].start)
        fail("a stack pointer is in no mapping");
    return mapping[low].end;
}

static size_t read_stacks(void) {
    size_t size = 0;
    for (int i = 0; i < threads; i++) {
        uint64_t start = registers[i].rsp & ~7ul;
        remote[i].iov_base = (void *)start;
        remote[i].iov_len = end_of_stack(start) - start;
        size += remote[i].iov_len;
    }
    if (size > sizeof words)
        fail("the stacks are too large");
    struct iovec local = {words, size};
    if (process_vm_readv(pid, &local, 1, remote, (unsigned long)threads, 0) != (ssize_t)size)
        fail("process_vm_readv");
    return size / 8;
}

static int is_forbidden(uint64_t word) {
    int low = 0, high = ranges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (range[middle].end <= word)
            low = middle + 1;
        else
            high = middle;
    }
    return low < ranges && range[low].start <= word;
}

static int scan(size_t count) {
    uint64_t lowest = ranges ? range[0].start : 1, span = ranges ? range[ranges - 1].end - lowest : 0;
    int found = 0;
    for (size_t i = 0; i < count; i++)
        if (words[i] - lowest < span)
            found += is_forbidden(words[i]);
    return found;
}

static void pause_once(void) {
    read_mappings();
    for (int i = 0; i < writes; i++)
        if (pread(memory, written[i].bytes, written[i].size, (off_t)written[i].address) != (ssize_t)written[i].size)
            fail("pread");
    seize_all();
    struct sched_param realtime = {PRIORITY}, normal = {0};
    if (sched_setscheduler(0, SCHED_FIFO, &realtime))
        fail("SCHED_FIFO");
    uint64_t begin = now();
    stop_all();
    int found = scan(read_stacks());
    for (int i = 0; i < writes; i++)
        if (pwrite(memory, written[i].bytes, written[i].size, (off_t)written[i].address) != (ssize_t)written[i].size)
            fail("pwrite");
    for (int i = 0; i < threads; i++)
        if (ptrace(PTRACE_DETACH, tids[i], 0, (long)signals[i]))
            fail("PTRACE_DETACH");
    uint64_t end = now();
    sched_setscheduler(0, SCHED_OTHER, &normal);
    printf("%lu %lu %d\n", begin, end, found);
    fflush(stdout);
}

int main(int count, char **arguments) {
    char name[64], line[16];
    if (count != 2)
        return 2;
    pid = atoi(arguments[1]);
    snprintf(name, sizeof name, "/proc/%d/mem", pid);
    memory = open(name, O_RDWR | O_CLOEXEC);
    if (memory < 0)
        fail(name);
    memset(words, 1, sizeof words); /* so that its pages exist */
    read_plan();
    while (fgets(line, sizeof line, stdin))
        if (line[0] == 'g')
            pause_once();
    return 0;
}
