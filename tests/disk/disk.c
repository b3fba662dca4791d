/* A disk that can hang, and that keeps the synced content of its files. LD_PRELOAD puts it before fsync and fdatasync
 * of the system.
 *
 * While the file $DISK_HANGS exists, neither returns. Each of them copies the content of a file in the directory
 * $DISK_SYNCED_IN to a file beside it, with the suffix ".synced": a power failure leaves that content intact.
 *
 * With $DISK_JOURNAL, that file gets an entry for each of these syncs: the line "NAME SIZE BLOCKS" of the file, and for
 * each block that has changed since its last sync the line "OFFSET LENGTH" and its bytes. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int keep(int from, const char *path) {
    char target[4200], unfinished[4300], bytes[1 << 16];
    snprintf(target, sizeof target, "%s.synced", path);
    snprintf(unfinished, sizeof unfinished, "%s.unfinished", target);
    int to = open(unfinished, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    if (to < 0) return -1;
    /* Reads by the same descriptor: closing another one would free the locks that the process has on the file. */
    off_t at = 0;
    ssize_t got;
    while ((got = pread(from, bytes, sizeof bytes, at)) > 0) {
        if (write(to, bytes, got) != got) break;
        at += got;
    }
    close(to);
    return got == 0 ? rename(unfinished, target) : -1;
}

/* Appends what has changed in a file since its last sync. Syncs of several files are entered one after the other. */
static int enter(int from, const char *path, const char *journal) {
    char target[4200], old[4096], new[4096];
    struct stat now;
    snprintf(target, sizeof target, "%s.synced", path);
    FILE *to = fopen(journal, "a");
    int synced = open(target, O_RDONLY);
    if (!to || fstat(from, &now) != 0) return -1;
    /* In two turns: the first one counts. */
    for (long turn = 0, blocks = 0; turn < 2; turn++) {
        if (turn == 1) fprintf(to, "%s %ld %ld\n", strrchr(path, '/') + 1, (long)now.st_size, blocks);
        for (off_t at = 0; at < now.st_size; at += sizeof new) {
            ssize_t got = pread(from, new, sizeof new, at), had = synced < 0 ? 0 : pread(synced, old, sizeof old, at);
            if (got <= 0) return -1;
            if (at + got > now.st_size) got = now.st_size - at;
            if (got == had && memcmp(old, new, got) == 0) continue;
            blocks++;
            if (turn == 0) continue;
            fprintf(to, "%ld %ld\n", (long)at, (long)got);
            fwrite(new, 1, got, to);
        }
    }
    if (synced >= 0) close(synced);
    return fclose(to);
}

static int synced(const char *name, int fd) {
    const char *hangs = getenv("DISK_HANGS"), *in = getenv("DISK_SYNCED_IN");
    while (hangs && access(hangs, F_OK) == 0) usleep(1000);
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = sync(fd);
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (result != 0 || !in || readlink(link, path, sizeof path - 1) <= 0) return result;
    int is_file = strncmp(path, in, strlen(in)) == 0 && path[strlen(in)] == '/';
    if (!is_file) return result;
    static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
    const char *journal = getenv("DISK_JOURNAL");
    pthread_mutex_lock(&turn);
    result = (journal && enter(fd, path, journal) != 0) || keep(fd, path) != 0 ? -1 : 0;
    pthread_mutex_unlock(&turn);
    return result;
}

int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }
