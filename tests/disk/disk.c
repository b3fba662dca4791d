/* A disk that can hang, and that keeps the synced content of its files. LD_PRELOAD puts it before fsync and fdatasync
 * of the system.
 *
 * While the file $DISK_HANGS exists, neither returns. Each of them copies the content of a file in the directory
 * $DISK_SYNCED_IN to a file beside it, with the suffix ".synced": a power failure leaves that content intact. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

static int synced(const char *name, int fd) {
    const char *hangs = getenv("DISK_HANGS"), *in = getenv("DISK_SYNCED_IN");
    while (hangs && access(hangs, F_OK) == 0) usleep(1000);
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = sync(fd);
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (result != 0 || !in || readlink(link, path, sizeof path - 1) <= 0) return result;
    int is_file = strncmp(path, in, strlen(in)) == 0 && path[strlen(in)] == '/';
    return is_file ? keep(fd, path) : result;
}

int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }
