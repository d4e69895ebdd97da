/* probe: the tests' payload. probe now | probe call NR [ARG…] | probe eat MiB | probe lines N SIZE | probe self */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void show(const char *file, char end)
{
	char buf[65536], *line, *next;
	FILE *f = fopen(file, "r");
	size_t n = 0;

	if (f) {
		n = fread(buf, 1, sizeof buf - 1, f);
		fclose(f);
	}
	buf[n] = 0;
	for (line = buf; line < buf + n; line = next) {
		next = strchr(line, end);
		next = next ? next : line + strlen(line);
		*next++ = 0;
		printf("%s: %s\n", file, line);
	}
}

static void links(const char *dir)
{
	char path[512], to[512];
	struct dirent **list;
	int n = scandir(dir, &list, 0, alphasort);

	for (int i = 0; i < n; i++) {
		snprintf(path, sizeof path, "%s/%s", dir, list[i]->d_name);
		ssize_t r = readlink(path, to, sizeof to - 1);
		if (r >= 0) {
			to[r] = 0;
			printf("%s: %s\n", path, to);
		}
	}
}

/* self prints all that a process inherits or is given. */
static void self(void)
{
	struct winsize size = { 0 };
	int sig = -1, i;
	char ring[256] = "";
	unsigned long mask = 0;

	printf("sid=pid %d pgid=pid %d ppid %d\n", getsid(0) == getpid(), getpgrp() == getpid(), getppid());
	printf("controlling terminal: foreground group is ours: %d\n", tcgetpgrp(0) == getpgrp());
	if (ioctl(0, TIOCGWINSZ, &size) == 0)
		printf("window %d %d\n", size.ws_row, size.ws_col);
	prctl(PR_GET_PDEATHSIG, &sig);
	printf("pdeathsig %d dumpable %d keepcaps %d securebits %d thp %d slack %d subreaper", sig, prctl(PR_GET_DUMPABLE),
	       prctl(PR_GET_KEEPCAPS), prctl(PR_GET_SECUREBITS), prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), prctl(PR_GET_TIMERSLACK));
	prctl(PR_GET_CHILD_SUBREAPER, &i);
	printf(" %d\n", i);
	printf("policy %d ioprio %ld nice %ld personality %x\n", sched_getscheduler(0),
	       syscall(SYS_ioprio_get, 1, 0), syscall(SYS_getpriority, 0, 0), personality(0xffffffff));
	syscall(SYS_sched_getaffinity, 0, sizeof mask, &mask);
	printf("cpus %lx\n", mask);
	syscall(SYS_keyctl, 6 /* KEYCTL_DESCRIBE */, -3 /* KEY_SPEC_SESSION_KEYRING */, ring, sizeof ring);
	printf("keyring %s\n", ring);
	for (i = 1; i <= 64; i++) {
		struct { void *h; unsigned long flags; void *r; unsigned long mask; } act = { 0 };
		if (syscall(SYS_rt_sigaction, i, 0, &act, 8) == 0 && act.h)
			printf("signal %d has a disposition\n", i);
	}
	show("/proc/self/status", '\n');
	show("/proc/self/limits", '\n');
	show("/proc/self/cgroup", '\n');
	show("/proc/self/mountinfo", '\n');
	show("/proc/self/environ", 0);
	show("/proc/self/cmdline", 0);
	show("/proc/self/oom_score_adj", '\n');
	show("/proc/self/attr/current", '\n');
	show("/proc/self/attr/exec", '\n');
	show("/proc/self/attr/keycreate", '\n');
	show("/proc/self/loginuid", '\n');
	show("/proc/self/timens_offsets", '\n');
	show("/proc/self/uid_map", '\n');
	show("/proc/self/setgroups", '\n');
	show("/proc/self/coredump_filter", '\n');
	for (i = 0; i < 16; i++) {
		char path[64];
		snprintf(path, sizeof path, "/proc/self/fdinfo/%d", i);
		show(path, '\n');
	}
	links("/proc/self/ns");
	links("/proc/self/fd");
	links("/proc/self");
}

int main(int argc, char **argv)
{
	struct timespec ts;
	long a[6] = { 0 };

	clock_gettime(CLOCK_MONOTONIC, &ts);
	if (argc < 2)
		return 2;
	if (!strcmp(argv[1], "now")) {
		printf("%lld\n", ts.tv_sec * 1000000000LL + ts.tv_nsec);
		return 0;
	}
	if (!strcmp(argv[1], "self")) {
		self();
		return 0;
	}
	if (!strcmp(argv[1], "call")) {
		for (int i = 3; i < argc && i < 9; i++)
			a[i - 3] = strtol(argv[i], 0, 0);
		errno = 0;
		syscall(atol(argv[2]), a[0], a[1], a[2], a[3], a[4], a[5]);
		printf("%s\n", errno == ENOSYS ? "ENOSYS" : errno == EPERM ? "EPERM" : errno ? strerror(errno) : "ok");
		return 0;
	}
	if (!strcmp(argv[1], "eat")) {
		for (long n = atol(argv[2]); n > 0; n--)
			memset(malloc(1 << 20), 1, 1 << 20);
		return 0;
	}
	if (!strcmp(argv[1], "lines")) {
		long n = atol(argv[2]), size = atol(argv[3]);
		char *line = malloc(size + 32);
		char *buf = malloc(1 << 20);
		setvbuf(stdout, buf, _IOFBF, 1 << 20);
		memset(line, 'x', size);
		for (long i = 0; i < n; i++) {
			int len = snprintf(line, 32, "%09ld", i);
			line[len] = ' ';
			line[size - 1] = '\n';
			fwrite(line, 1, size, stdout);
		}
		fflush(stdout);
		return 0;
	}
	return 2;
}
