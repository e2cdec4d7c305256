/* What the pause does once for every thread, in one call for all of them.

   Optional: patcher/batch.py opens it where it was built, and everything here is done in Python where not. It decides
   nothing. Wait statuses and errors are handed back as the kernel gave them, and a stack that is anything but plain is
   left to Python (``livegraft_sift``). No Python.h: nothing but a C compiler is needed to build it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

#define EXPORT __attribute__((visibility("default")))

/* Raised with every change of what Python sees of this file; ABI of batch.py must be the same. */
#define ABI 2
EXPORT int livegraft_batch_abi(void) { return ABI; }

/* The text that this was built from, as a digest: a test compares it with the file. */
#ifndef SOURCE
#define SOURCE "unknown"
#endif
EXPORT const char *livegraft_batch_source(void) { return SOURCE; }

/* --- requests to all threads; each tells in failures[i] the errno of thread i, or 0, and returns how many failed --- */

EXPORT int livegraft_interrupt(const int *tids, int count, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++) {
        failures[i] = ptrace(PTRACE_INTERRUPT, tids[i], NULL, NULL) ? errno : 0;
        failed += failures[i] != 0;
    }
    return failed;
}

EXPORT int livegraft_registers(const int *tids, int count, struct user_regs_struct *registers, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++) {
        failures[i] = ptrace(PTRACE_GETREGS, tids[i], NULL, &registers[i]) ? errno : 0;
        failed += failures[i] != 0;
    }
    return failed;
}

EXPORT int livegraft_detach(const int *tids, const int *signals, int count, int *failures) {
    int failed = 0;
    for (int i = 0; i < count; i++) {
        failures[i] = ptrace(PTRACE_DETACH, tids[i], NULL, (long)signals[i]) ? errno : 0;
        failed += failures[i] != 0;
    }
    return failed;
}

/* Wait for the threads one after the other until a signal comes. Returns how many have been waited for; statuses[i] is
   what waitpid(2) would report, or -1 where it knows no such child any more. A stop is only looked at, and not taken:
   a signal that has been taken is lost if this process dies before it detaches (tracees.py). */
EXPORT int livegraft_wait(const int *tids, int count, int *statuses) {
    for (int i = 0; i < count; i++) {
        siginfo_t info;
        if (waitid(P_PID, tids[i], &info, WSTOPPED | WEXITED | WNOWAIT | __WALL)) {
            if (errno == EINTR)
                return i;
            statuses[i] = -1;
        } else if (info.si_code == CLD_TRAPPED || info.si_code == CLD_STOPPED) {
            statuses[i] = info.si_status << 8 | 0x7f;
        } else if (waitpid(tids[i], &statuses[i], __WALL) != tids[i]) {
            statuses[i] = -1;
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

static int matters(const struct filter *filter, uint64_t word) {
    for (int64_t i = 0; i < filter->clusters; i++)
        if (word - filter->lows[i] <= filter->spans[i] && in_range(filter, word))
            return 1;
    for (int64_t i = 0; i < filter->restorer_count; i++)
        if (word - filter->restorers[i] < filter->restorer_size)
            return 1;
    return 0;
}

/* Whether any of count words matters. */
EXPORT int livegraft_scan(const struct filter *filter, const uint64_t *words, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (matters(filter, words[i]))
            return 1;
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
    if (ioctl(maps, QUERY, &query))
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

#define RUNS 64

/* Stack memory that is read by one call: runs of several threads, one behind the other in the buffer. */
struct batch {
    int pid, count;
    struct iovec remote[RUNS];
    int owner[RUNS];
    uint64_t *words;
    size_t room, used; /* bytes */
};

static int flush(struct batch *batch, const struct filter *filter, uint8_t *odd) {
    struct iovec local = {batch->words, batch->used};
    if (batch->used == 0)
        return 0;
    ssize_t got = process_vm_readv(batch->pid, &local, 1, batch->remote, (unsigned long)batch->count, 0);
    if (got < 0 && errno != EFAULT)
        return errno;
    const uint64_t *words = batch->words;
    for (int i = 0; i < batch->count; i++) {
        size_t size = batch->remote[i].iov_len;
        /* What could not be read whole is left to Python, which finds out whose it is. */
        if (got != (ssize_t)batch->used || livegraft_scan(filter, words, size / 8))
            odd[batch->owner[i]] = 1;
        words += size / 8;
    }
    batch->count = 0;
    batch->used = 0;
    return 0;
}

static int add(struct batch *batch, const struct filter *filter, uint8_t *odd, int owner, uint64_t start, uint64_t end) {
    while (start < end) {
        if (batch->count == RUNS || batch->used == batch->room) {
            int failure = flush(batch, filter, odd);
            if (failure)
                return failure;
        }
        size_t size = end - start < batch->room - batch->used ? end - start : batch->room - batch->used;
        batch->remote[batch->count] = (struct iovec){(void *)start, size};
        batch->owner[batch->count++] = owner;
        batch->used += size;
        start += size;
    }
    return 0;
}

/* Look through the registers and the stack of every thread, from its stack pointer to the end. odd[i] is 1 where a word
   matters or something is unusual, else 0: then nothing of thread i is live, and it is in no signal handler. The buffer has
   room for a multiple of 8 bytes. Returns 0, or an errno where it could not be done for all; *scanned counts bytes. */
EXPORT int livegraft_sift(int pid, int maps, const struct user_regs_struct *registers, int count,
                          const struct filter *filter, uint64_t max_stack, uint64_t max_stacks, uint64_t *buffer,
                          size_t room, uint8_t *odd, uint64_t *scanned) {
    struct batch batch = {.pid = pid, .words = buffer, .room = room};
    *scanned = 0;
    for (int i = 0; i < count; i++) {
        uint64_t pointer = registers[i].rsp;
        odd[i] = pointer % 8 != 0 ||
                 livegraft_scan(filter, (const uint64_t *)&registers[i], sizeof registers[i] / sizeof(uint64_t));
        if (odd[i])
            continue;
        uint64_t end = end_of_stack(maps, pointer, registers[i].fs_base, pointer + max_stack);
        if (end == 0 && errno != ENOENT)
            return errno;
        if (end == 0 || end - pointer > max_stack) {
            odd[i] = 1;
            continue;
        }
        *scanned += end - pointer;
        if (*scanned > max_stacks)
            return EFBIG;
        int failure = add(&batch, filter, odd, i, pointer, end);
        if (failure)
            return failure;
    }
    return flush(&batch, filter, odd);
}
