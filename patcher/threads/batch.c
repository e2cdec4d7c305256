/* What the pause does once for every thread, in one call for all of them; and a whole pause in which nothing is unusual.

   Optional: batch.py opens it where it was built, and everything here is done in Python where not. It decides
   nothing. Wait statuses and errors are handed back as the kernel gave them, a stack that is anything but plain is
   left to Python (``livegraft_sift``), and so is a pause, at the first thing in it that is (``livegraft_pause``).
   No Python.h: nothing but a C compiler is needed to build it. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* Raised with every change of what Python sees of this file; ABI of batch.py must be the same. */
#define ABI 4
EXPORT int livegraft_batch_abi(void) { return ABI; }

/* The text that this was built from, as a digest: a test compares it with the file. */
#ifndef SOURCE
#define SOURCE "unknown"
#endif
EXPORT const char *livegraft_batch_source(void) { return SOURCE; }

/* --- operations on a target, each of which a test can make fail, or the last of this process --- */

static long until_disturbed; /* operations up to the one that is disturbed; 0: none is */
static int disturbance; /* the errno that it gets, or 0: this process dies before it */

/* Disturb the n-th operation from now on, counted from 1; returns what was left to go of the last such wish. */
EXPORT long livegraft_disturb(long operation, int how) {
    long left = until_disturbed;
    until_disturbed = operation;
    disturbance = how;
    return left;
}

static int disturbed(void) {
    if (until_disturbed == 0 || --until_disturbed > 0)
        return 0;
    if (disturbance == 0)
        kill(getpid(), SIGKILL);
    errno = disturbance;
    return 1;
}

static int request(int number, int tid, const void *data) {
    return disturbed() || ptrace(number, tid, NULL, data) ? errno : 0;
}

static ssize_t read_many(int pid, void *words, size_t size, const struct iovec *remote, int count) {
    struct iovec local = {words, size};
    return disturbed() ? -1 : process_vm_readv(pid, &local, 1, remote, (unsigned long)count, 0);
}

/* --- requests to all threads; each tells in failures[i] the errno of thread i, or 0, and returns how many failed --- */

EXPORT int livegraft_interrupt(const int *tids, int count, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++)
        failed += (failures[i] = request(PTRACE_INTERRUPT, tids[i], NULL)) != 0;
    return failed;
}

EXPORT int livegraft_registers(const int *tids, int count, struct user_regs_struct *registers, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++)
        failed += (failures[i] = request(PTRACE_GETREGS, tids[i], &registers[i])) != 0;
    return failed;
}

EXPORT int livegraft_detach(const int *tids, const int *signals, int count, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++)
        failed += (failures[i] = request(PTRACE_DETACH, tids[i], (void *)(long)signals[i])) != 0;
    return failed;
}

/* Wait for the threads one after the other until a signal comes. Returns how many have been waited for; statuses[i] is
   what waitpid(2) would report of a stop, 0 of a thread that has exited, or -1 where it knows no such child any more.
   All is only looked at: a signal that has been taken is lost if this process dies before it detaches, and which exits
   are to be taken is not decided here (tracees.py). */
EXPORT int livegraft_wait(const int *tids, int count, int *statuses) {
    for (int i = 0; i < count; i++) {
        siginfo_t info;
        if (disturbed() || waitid(P_PID, (id_t)tids[i], &info, WSTOPPED | WEXITED | WNOWAIT | __WALL)) {
            if (errno == EINTR)
                return i;
            statuses[i] = -1;
        } else if (info.si_code == CLD_TRAPPED || info.si_code == CLD_STOPPED) {
            statuses[i] = info.si_status << 8 | 0x7f;
        } else {
            statuses[i] = 0;
        }
    }
    return count;
}

/* --- the scan of stacks --- */

/* Words that matter: in one of the forbidden ranges, as ForbiddenRanges.return_addresses of forbidden.py has it, or in the
   code that signal handlers return to. */
struct filter {
    const uint64_t *starts, *ends; /* ranges by rising address, disjoint; [start, end) */
    const uint8_t *harmless; /* their start is no hit */
    int64_t ranges;
    const uint64_t *lows, *spans; /* clusters of ranges: lowest start, distance to the highest end */
    int64_t clusters;
    const uint64_t *restorers;
    int64_t restorer_count;
    uint64_t restorer_size;
};

static int in_range(const struct filter *filter, uint64_t word) {
    int64_t low = 0, high = filter->ranges; /* the last range that starts at or below the word is low - 1 */
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (filter->starts[middle] <= word)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return 0;
    int64_t here = low - 1;
    if (word <= filter->ends[here] && !(word == filter->starts[here] && filter->harmless[here]))
        return 1;
    return here > 0 && word == filter->ends[here - 1];
}

/* Whether any of count words matters. One pass for each thing that is looked for: no loop within the loop. */
EXPORT int livegraft_scan(const struct filter *filter, const uint64_t *words, size_t count) {
    for (int64_t cluster = 0; cluster < filter->clusters; cluster++) {
        uint64_t low = filter->lows[cluster], span = filter->spans[cluster];
        for (size_t i = 0; i < count; i++)
            if (words[i] - low <= span && in_range(filter, words[i]))
                return 1;
    }
    for (int64_t i = 0; i < filter->restorer_count; i++) {
        uint64_t low = filter->restorers[i], size = filter->restorer_size;
        for (size_t word = 0; word < count; word++)
            if (words[word] - low < size)
                return 1;
    }
    return 0;
}

/* ioctl PROCMAP_QUERY (include/uapi/linux/fs.h, v6.11), with the fields that are used here. */
struct query {
    uint64_t size, flags, address, start, end, protection;
    uint64_t unused[7];
};
#define QUERY _IOC(_IOC_READ | _IOC_WRITE, 'f', 17, sizeof(struct query))
#define READABLE 1u
#define WRITABLE 2u

/* Where the stack at pointer ends: as StackMemory.end of stackmemory.py. 0 where it is not known, and errno then. */
static uint64_t end_of_stack(int maps, uint64_t pointer, uint64_t thread_pointer, uint64_t limit) {
    struct query query = {.size = sizeof query, .address = pointer};
    if (disturbed() || ioctl(maps, QUERY, &query))
        return 0;
    if (!(query.protection & READABLE)) {
        errno = ENOENT;
        return 0;
    }
    uint64_t end = query.end;
    while (end < limit && !(pointer < thread_pointer && thread_pointer < end)) {
        query = (struct query){.size = sizeof query, .address = end};
        if (ioctl(maps, QUERY, &query)) {
            if (errno != ENOENT)
                return 0;
            break;
        }
        if ((query.protection & (READABLE | WRITABLE)) != (READABLE | WRITABLE))
            break;
        end = query.end;
    }
    return end;
}

/* How to look through the stacks of a process. */
struct stacks {
    int pid, maps; /* maps: a descriptor of /proc/PID/maps */
    struct filter filter;
    uint64_t max_stack, max_stacks; /* bytes of one, and of all, above which Python decides */
    uint64_t start_stack; /* the stack pointer that the kernel gave to the main thread */
    uint64_t *words; /* room for what is read at a time */
    size_t room; /* bytes, a multiple of 8 */
    uint64_t scanned; /* out: bytes that were looked at */
    int64_t strays; /* out: threads that run on another stack than their own */
};

#define RUNS 64

/* Stack memory that is read by one call: runs of several threads, one behind the other in the buffer. */
struct batch {
    int count;
    struct iovec remote[RUNS];
    int owner[RUNS];
    size_t used; /* bytes */
};

static int flush(struct batch *batch, struct stacks *stacks, uint8_t *odd) {
    if (batch->used == 0)
        return 0;
    ssize_t got = read_many(stacks->pid, stacks->words, batch->used, batch->remote, batch->count);
    if (got < 0 && errno != EFAULT)
        return errno;
    const uint64_t *words = stacks->words;
    for (int i = 0; i < batch->count; i++) {
        size_t size = batch->remote[i].iov_len;
        /* What could not be read whole is left to Python, which finds out whose it is. */
        if (got != (ssize_t)batch->used || livegraft_scan(&stacks->filter, words, size / 8))
            odd[batch->owner[i]] = 1;
        words += size / 8;
    }
    batch->count = 0;
    batch->used = 0;
    return 0;
}

static int add(struct batch *batch, struct stacks *stacks, uint8_t *odd, int owner, uint64_t start, uint64_t end) {
    while (start < end) {
        if (batch->count == RUNS || batch->used == stacks->room) {
            int failure = flush(batch, stacks, odd);
            if (failure)
                return failure;
        }
        size_t size = end - start < stacks->room - batch->used ? end - start : stacks->room - batch->used;
        batch->remote[batch->count] = (struct iovec){(void *)start, size};
        batch->owner[batch->count++] = owner;
        batch->used += size;
        start += size;
    }
    return 0;
}

/* Look through the registers and the stack of every thread, from its stack pointer to the end. odd[i] is 1 where a word
   matters or something is unusual, else 0: then nothing of thread i is live, and it is in no signal handler. Returns 0, or
   an errno where it could not be done for all. */
EXPORT int livegraft_sift(struct stacks *stacks, const int *tids, const struct user_regs_struct *registers, int count,
                          uint8_t *odd) {
    struct batch batch = {.count = 0};
    stacks->scanned = 0;
    stacks->strays = 0;
    for (int i = 0; i < count; i++) {
        uint64_t pointer = registers[i].rsp;
        odd[i] = pointer % 8 != 0 ||
                 livegraft_scan(&stacks->filter, (const uint64_t *)&registers[i], sizeof registers[i] / sizeof(uint64_t));
        if (odd[i])
            continue;
        uint64_t end = end_of_stack(stacks->maps, pointer, registers[i].fs_base, pointer + stacks->max_stack);
        if (end == 0 && errno != ENOENT)
            return errno;
        if (end == 0 || end - pointer > stacks->max_stack) {
            odd[i] = 1;
            continue;
        }
        /* As StackCheck._is_on_own_stack of quiescence.py. */
        uint64_t top = tids[i] == stacks->pid ? stacks->start_stack : registers[i].fs_base;
        stacks->strays += !(pointer <= top && top < end);
        stacks->scanned += end - pointer;
        if (stacks->scanned > stacks->max_stacks)
            return EFBIG;
        int failure = add(&batch, stacks, odd, i, pointer, end);
        if (failure)
            return failure;
    }
    return flush(&batch, stacks, odd);
}

/* --- a pause in which nothing is unusual --- */

struct range {
    uint64_t address, size; /* in the target */
    const void *bytes;
};

/* What there is to be done, made ready by quickpause.py. Addresses in the target are numbers. */
struct pause {
    struct stacks *stacks;
    const int *tids; /* all threads, seized but for the last of them (head of stopping.py) */
    int32_t count, last;
    int32_t task, status, statm, memory; /* descriptors of these in /proc/PID; memory is mem */
    const char *code_size; /* the lines of /proc/PID/status that say how much code is mapped */
    uint64_t mapped[2]; /* and livegraft_mapped at that time */
    int32_t own_stacks; /* whether each thread has to be on its own stack */
    int32_t call_count;
    const uint8_t *calls; /* by number of a system call that says EINTR: one of the values below */
    const struct range *expected; /* what the target must hold */
    int64_t expected_count;
    const struct range *writes; /* what it will hold, in this order */
    int64_t write_count;
    uint64_t patience; /* ns that waiting for the threads may take */
    struct user_regs_struct *registers; /* room for each thread, here and below */
    int *statuses, *failures, *signals; /* signals: all 0 */
    uint8_t *odd;
    int64_t written; /* out: writes that were made */
    uint64_t began, ended; /* out: ns of CLOCK_MONOTONIC, before the first PTRACE_INTERRUPT and after the last DETACH */
};

/* Where a pause was left to Python: before or in this step. */
enum step { DONE, INTERRUPT, WAIT, THREADS, REGISTERS, STACKS, CODE, COMPARE, WRITE };

enum call { LEAVE, REPAIR, ASK }; /* ASK: only Python can tell what to do */

/* include/uapi/linux/ptrace.h: PTRACE_EVENT_STOP with SIGTRAP, what nearly every tracee reports. */
#define PLAIN_STOP (128 << 16 | SIGTRAP << 8 | 0x7f)
/* registers_x86_64.py says what these are for. */
#define RESULT_EINTR (-4l)
#define RESULT_ERESTARTNOHAND (-514l)
#define USER_CODE_64 0x33
#define RANGES 1024 /* UIO_MAXIOV */
#define STATUS_SIZE 4096
#define STATM_SIZE 256

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* All others will stop before they go on in their program when the last are seized. */
static int interrupt_all(const struct pause *pause) {
    int others = pause->count - pause->last;
    if (livegraft_interrupt(pause->tids, others, pause->failures))
        return 0;
    for (int i = others; i < pause->count; i++)
        if (request(PTRACE_SEIZE, pause->tids[i], (void *)PTRACE_O_TRACEEXEC)) /* as stopping.py does */
            return 0;
    return livegraft_interrupt(pause->tids + others, pause->last, pause->failures + others) == 0;
}

/* Those that were seized last go first. */
static void detach_all(const struct pause *pause) {
    int others = pause->count - pause->last;
    livegraft_detach(pause->tids + others, pause->signals, pause->last, pause->failures + others);
    livegraft_detach(pause->tids, pause->signals, others, pause->failures);
}

static int all_stop(const struct pause *pause) {
    int done = 0;
    while ((done += livegraft_wait(pause->tids + done, pause->count - done, pause->statuses + done)) < pause->count)
        if (now() - pause->began > pause->patience) /* asked whenever a signal came */
            return 0;
    for (int i = 0; i < pause->count; i++)
        if (pause->statuses[i] != PLAIN_STOP)
            return 0;
    return 1;
}

/* As SeizedProcess._all_are_stopped of stopping.py. */
static int no_other_thread(const struct pause *pause) {
    struct stat folder;
    return !disturbed() && fstat(pause->task, &folder) == 0 && folder.st_nlink == (nlink_t)pause->count + 2;
}

/* As without_spurious_eintr of registers_x86_64.py, at once for each thread. */
static int read_and_repair(const struct pause *pause) {
    if (livegraft_registers(pause->tids, pause->count, pause->registers, pause->failures))
        return 0;
    for (int i = 0; i < pause->count; i++) {
        struct user_regs_struct *registers = &pause->registers[i];
        if ((long)registers->rax != RESULT_EINTR || registers->cs != USER_CODE_64 ||
            registers->orig_rax >= (uint64_t)pause->call_count)
            continue;
        uint8_t call = pause->calls[registers->orig_rax];
        if (call == ASK)
            return 0;
        if (call != REPAIR)
            continue;
        registers->rax = (uint64_t)RESULT_ERESTARTNOHAND;
        if (request(PTRACE_SETREGS, pause->tids[i], registers))
            return 0;
    }
    return 1;
}

static int nothing_is_live(const struct pause *pause) {
    if (livegraft_sift(pause->stacks, pause->tids, pause->registers, pause->count, pause->odd))
        return 0;
    if (pause->own_stacks && pause->stacks->strays)
        return 0;
    return memchr(pause->odd, 1, (size_t)pause->count) == NULL;
}

/* The pages that are mapped, and those of data and stacks: fields 1 and 6 of /proc/PID/statm (proc(5)). */
EXPORT int livegraft_mapped(int statm, uint64_t mapped[2]) {
    char text[STATM_SIZE], *end = text;
    ssize_t got = disturbed() ? -1 : pread(statm, text, sizeof text - 1, 0);
    if (got <= 0)
        return -1;
    text[got] = 0;
    for (int field = 1; field <= 6; field++) {
        uint64_t pages = strtoull(end, &end, 10);
        if (field == 1 || field == 6)
            mapped[field == 6] = pages;
    }
    return 0;
}

/* Where no page more and none less is mapped than before, and as many are data, no code was either. Else the lines of
   /proc/PID/status say, which take ten times as long. */
static int code_is_as_it_was(const struct pause *pause) {
    uint64_t mapped[2];
    if (livegraft_mapped(pause->statm, mapped) == 0 && mapped[0] == pause->mapped[0] && mapped[1] == pause->mapped[1])
        return 1;
    char status[STATUS_SIZE];
    ssize_t got = disturbed() ? -1 : pread(pause->status, status, sizeof status - 1, 0);
    if (got < 0)
        return 0;
    status[got] = 0;
    return strstr(status, pause->code_size) != NULL;
}

static int holds_what_is_expected(const struct pause *pause) {
    struct stacks *stacks = pause->stacks;
    struct iovec remote[RANGES];
    for (int64_t first = 0, next; first < pause->expected_count; first = next) {
        size_t size = 0;
        for (next = first; next < pause->expected_count && next - first < RANGES; next++) {
            const struct range *range = &pause->expected[next];
            if (size + range->size > stacks->room)
                break;
            remote[next - first] = (struct iovec){(void *)range->address, range->size};
            size += range->size;
        }
        if (next == first || read_many(stacks->pid, stacks->words, size, remote, (int)(next - first)) != (ssize_t)size)
            return 0;
        const uint8_t *held = (const uint8_t *)stacks->words;
        for (int64_t i = first; i < next; held += pause->expected[i++].size)
            if (memcmp(held, pause->expected[i].bytes, pause->expected[i].size) != 0)
                return 0;
    }
    return 1;
}

static int write_all(struct pause *pause) {
    for (; pause->written < pause->write_count; pause->written++) {
        const struct range *range = &pause->writes[pause->written];
        if (disturbed() || pwrite(pause->memory, range->bytes, range->size, (off_t)range->address) != (ssize_t)range->size)
            return 0;
    }
    return 1;
}

/* Do what can be done to a process that runs, so that the kernel's code and ours, and what they look at, is where the
   processor finds it sooner: a third less of a short pause. Nothing of it counts. */
static void rehearse(const struct pause *pause) {
    siginfo_t info;
    /* Give up the processor once: who waits for it, such as a thread of the target, has run before the pause. */
    nanosleep(&(struct timespec){.tv_nsec = 1000}, NULL);
    for (int i = 0; i < pause->count; i++)
        waitid(P_PID, (id_t)pause->tids[i], &info, WSTOPPED | WNOWAIT | WNOHANG | __WALL);
    no_other_thread(pause);
    code_is_as_it_was(pause);
    holds_what_is_expected(pause);
}

/* Stop all threads, check, write and let them go, as _one_stop of pause.py. Returns DONE, or the step at which something
   was unusual: then all threads are held, as far as they have stopped, and only in WRITE may something have been written.
   Where failures[i] is not 0 after DONE, thread i could not be let go. */
EXPORT int livegraft_pause(struct pause *pause) {
    rehearse(pause);
    pause->written = 0;
    pause->began = now();
    if (!interrupt_all(pause))
        return INTERRUPT;
    if (!all_stop(pause))
        return WAIT;
    if (!no_other_thread(pause))
        return THREADS;
    if (!read_and_repair(pause))
        return REGISTERS;
    if (!nothing_is_live(pause))
        return STACKS;
    if (!code_is_as_it_was(pause))
        return CODE;
    if (!holds_what_is_expected(pause))
        return COMPARE;
    if (!write_all(pause))
        return WRITE;
    detach_all(pause);
    pause->ended = now();
    return DONE;
}
