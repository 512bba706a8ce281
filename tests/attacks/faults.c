/* Preloaded into a process: counts the operations that change what lies under one folder, and at a chosen one kills or
 * stops the process or lets the disk be full from there on. Armed by the process itself, so that a forked one can be.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, STOP };
enum { WRITE = 1, SYNC = 2, RENAME = 4, REMOVE = 8, CREATE = 16, MODE = 32 };

static char folder[4096];
static atomic_long operations;
static long chosen = -1;
static int action, kinds, error_number;

/* From now on operations of `which` kinds under `path` are counted from 0; `what` happens at number `at`. */
void faults_arm(const char *path, int what, long at, int which, int error) {
    snprintf(folder, sizeof folder, "%s", path);
    action = what, chosen = at, kinds = which, error_number = error;
    atomic_store(&operations, 0);
}

long faults_counted(void) { return atomic_load(&operations); }

static int inside(const char *path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int path_inside(int directory, const char *path) {
    if (!folder[0] || !path) return 0;
    if (path[0] == '/' || directory == AT_FDCWD) return inside(path);
    char link[64], whole[8192];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t size = readlink(link, whole, 4096);
    if (size < 0) return 0;
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return inside(whole);
}

static int file_inside(int file) {
    char link[64], whole[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, whole, sizeof whole - 1);
    if (size < 0) return 0;
    whole[size] = 0;
    return inside(whole);
}

/* Counts one operation; returns an error number where it is to fail, 0 where it is to go on, -1 where it is the one at
 * which a write is to be torn first. */
static int met(int kind) {
    if (!(kind & kinds)) return 0;
    long number = atomic_fetch_add(&operations, 1);
    if (action == FULL && chosen >= 0 && number >= chosen && (kind & (WRITE | SYNC | CREATE))) return error_number;
    if (number != chosen) return 0;
    if (action == KILL) {
        if (kind == WRITE) return -1;
        raise(SIGKILL);
    }
    if (action == STOP) raise(SIGSTOP);
    return 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define FAIL(number) do { errno = number; return -1; } while (0)

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    int how = file_inside(file) ? met(WRITE) : 0;
    if (how < 0) { real(file, data, size / 2); raise(SIGKILL); }
    if (how) FAIL(how);
    return real(file, data, size);
}

#define PWRITE(name) \
    ssize_t name(int file, const void *data, size_t size, off_t offset) { \
        REAL(ssize_t, name, int, const void *, size_t, off_t); \
        int how = file_inside(file) ? met(WRITE) : 0; \
        if (how < 0) { real(file, data, size / 2, offset); raise(SIGKILL); } \
        if (how) FAIL(how); \
        return real(file, data, size, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SENT(name) \
    ssize_t name(int file, int from, off_t *offset, size_t size) { \
        REAL(ssize_t, name, int, int, off_t *, size_t); \
        int how = file_inside(file) ? met(WRITE) : 0; \
        if (how < 0) { real(file, from, offset, size / 2); raise(SIGKILL); } \
        if (how) FAIL(how); \
        return real(file, from, offset, size); \
    }
SENT(sendfile)
SENT(sendfile64)

#define FALLOCATE(name) \
    int name(int file, off_t offset, off_t size) { \
        REAL(int, name, int, off_t, off_t); \
        int how = file_inside(file) ? met(CREATE) : 0; \
        return how > 0 ? how : real(file, offset, size); \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)

#define SYNCED(name) \
    int name(int file) { \
        REAL(int, name, int); \
        int how = file_inside(file) ? met(SYNC) : 0; \
        if (how > 0) FAIL(how); \
        return real(file); \
    }
SYNCED(fsync)
SYNCED(fdatasync)

#define OPENED(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        REAL(int, name, const char *, int, ...); \
        int how = (flags & (O_CREAT | O_TRUNC)) && path_inside(AT_FDCWD, path) ? met(CREATE) : 0; \
        if (how > 0) FAIL(how); \
        return real(path, flags, mode); \
    }
OPENED(open)
OPENED(open64)

#define OPENED_AT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        REAL(int, name, int, const char *, int, ...); \
        int how = (flags & (O_CREAT | O_TRUNC)) && path_inside(directory, path) ? met(CREATE) : 0; \
        if (how > 0) FAIL(how); \
        return real(directory, path, flags, mode); \
    }
OPENED_AT(openat)
OPENED_AT(openat64)

int ftruncate64(int file, off_t size) {
    REAL(int, ftruncate64, int, off_t);
    int how = file_inside(file) ? met(WRITE) : 0;
    if (how < 0) raise(SIGKILL);
    if (how) FAIL(how);
    return real(file, size);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    int how = path_inside(AT_FDCWD, path) ? met(CREATE) : 0;
    if (how > 0) FAIL(how);
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    if (path_inside(AT_FDCWD, to)) met(RENAME);
    return real(from, to);
}

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    if (path_inside(AT_FDCWD, path)) met(REMOVE);
    return real(path);
}

int unlinkat(int directory, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    if (path_inside(directory, path)) met(REMOVE);
    return real(directory, path, flags);
}

int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    if (path_inside(AT_FDCWD, path)) met(REMOVE);
    return real(path);
}

int chmod(const char *path, mode_t mode) {
    REAL(int, chmod, const char *, mode_t);
    if (path_inside(AT_FDCWD, path)) met(MODE);
    return real(path, mode);
}
