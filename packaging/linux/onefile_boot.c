/* Linked into the one-file program's boot process (Linux), which unpacks the real program and waits for it.
 *
 * Unpacking needs a folder that may be written and executed from. The boot process knows only TMPDIR and /tmp, and
 * hardened machines mount that noexec or leave it read-only: so look further, before it starts. What an earlier,
 * killed boot process left behind is removed: a lock held by it and its program tells whether they live.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define PREFIX "medplum-agent-"
#define NEEDED_BYTES (48 << 20) /* the program takes 35 MB; a folder that it fills would stop others, too */

static char folder[PATH_MAX];
static int lock = -1; /* of the folder; inherited by the program on purpose */
static pid_t boot;

static int removed(const char *path, const struct stat *status, int kind, struct FTW *ftw) {
    (void)status, (void)kind, (void)ftw;
    return remove(path);
}

static void remove_abandoned(const char *parent) {
    DIR *listing = opendir(parent);
    struct dirent *entry;
    while (listing && (entry = readdir(listing))) {
        char path[PATH_MAX];
        struct stat status;
        if (strncmp(entry->d_name, PREFIX, strlen(PREFIX)) || strlen(entry->d_name) != strlen(PREFIX) + 6) continue;
        if (snprintf(path, sizeof path, "%s/%s", parent, entry->d_name) >= (int)sizeof path) continue;
        int other = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (other < 0) continue;
        if (!fstat(other, &status) && status.st_uid == geteuid() && !flock(other, LOCK_EX | LOCK_NB))
            nftw(path, removed, 16, FTW_DEPTH | FTW_PHYS);
        close(other);
    }
    if (listing) closedir(listing);
}

/* A folder of our own in `parent`, locked until the last process that inherits the lock is gone. */
static int taken(const char *parent, const char *below) {
    struct statvfs system;
    int length = parent ? snprintf(folder, sizeof folder, "%s%s", parent, below) : -1;
    if (length <= 0 || length + 32 > (int)sizeof folder || folder[0] != '/') return 0;
    if (statvfs(folder, &system) || system.f_flag & (ST_NOEXEC | ST_RDONLY)) return 0;
    remove_abandoned(folder);
    if (statvfs(folder, &system) || (unsigned long long)system.f_bavail * system.f_frsize < NEEDED_BYTES) return 0;
    strcat(folder, "/" PREFIX "XXXXXX");
    if (!mkdtemp(folder)) return 0;
    lock = open(folder, O_RDONLY | O_DIRECTORY);
    return lock >= 0 && !flock(lock, LOCK_EX);
}

static void end_with_boot(void) { /* in the child, between fork and exec */
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a boot process that is killed shall not leave a program that nobody waits for */
    if (getppid() != boot) _exit(1);
}

static int forgotten(struct dl_phdr_info *program, size_t size, void *unused) { /* the packed program is unpacked now */
    (void)size, (void)unused;
    for (int number = 0; number < program->dlpi_phnum; number++) {
        const ElfW(Phdr) *part = &program->dlpi_phdr[number];
        size_t start = program->dlpi_addr + part->p_vaddr, page = start & (size_t)(getpagesize() - 1);
        if (part->p_type == PT_LOAD && part->p_flags == PF_R)
            madvise((void *)(start - page), part->p_memsz + page, MADV_DONTNEED);
    }
    return 1; /* the boot process itself comes first: no library */
}

static void let_go(void) { /* in the boot process, after fork: what an earlier version left is for the program alone */
    dl_iterate_phdr(forgotten, NULL);
    DIR *listing = getenv("MEDPLUM_AGENT_HANDOVER") ? opendir("/proc/self/fd") : NULL;
    struct dirent *entry;
    while (listing && (entry = readdir(listing))) {
        int number = atoi(entry->d_name);
        if (number > 2 && number != lock && number != dirfd(listing)) close(number);
    }
    if (listing) closedir(listing);
}

static void hang_up(int number, siginfo_t *origin, void *context) { /* the boot process itself knows no SIGHUP */
    (void)number, (void)context;
    if (origin->si_code != SI_KERNEL) kill(boot, SIGTERM); /* a terminal tells the program itself */
}

__attribute__((constructor)) static void prepare(void) {
    struct sigaction action = {.sa_sigaction = hang_up, .sa_flags = SA_SIGINFO};
    boot = getpid();
    for (int number = 0; number < 3; number++) /* else a file of ours would take the place of a closed one */
        if (fcntl(number, F_GETFD) < 0 && open("/dev/null", O_RDWR) != number) exit(1);
    sigaction(SIGHUP, &action, NULL);
    pthread_atfork(NULL, let_go, end_with_boot);
    if (taken(getenv("TMPDIR"), "") || taken("/tmp", "") || taken("/var/tmp", "") ||
        taken(getenv("XDG_RUNTIME_DIR"), "") || taken("/dev/shm", "") || taken("/run", "") ||
        taken(getenv("STATE_DIRECTORY"), "") || taken("/var/lib/medplum-agent", "") ||
        taken(getenv("XDG_CACHE_HOME"), "") || taken(getenv("HOME"), "") || taken(getenv("PWD"), "")) {
        setenv("TMPDIR", folder, 1);
        return;
    }
    fputs("medplum-agent: no folder to unpack to: /tmp, /var/tmp and others are read-only, full or mounted noexec.\n"
          "Set TMPDIR to a folder that may be written and executed from, or install the package instead.\n", stderr);
    exit(1);
}

__attribute__((destructor)) static void tidy(void) {
    if (getpid() == boot && folder[0]) nftw(folder, removed, 16, FTW_DEPTH | FTW_PHYS);
}
