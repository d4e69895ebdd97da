/*
 * racer SECONDS: what a container with CAP_SYS_PTRACE does that wants more
 * than it has. It waits for each new process of its PID namespace, attaches to
 * it before it has run an instruction where it can, and looks at what it got
 * hold of: more capabilities than the container may have, a missing seccomp
 * filter, descriptors of the runtime.
 *
 * Prints a line "reached: ..." for each such process and at last
 * "caught N, reached M".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <fcntl.h>
#include <unistd.h>

struct rights {
	char name[32];
	unsigned long prm, eff, bnd;
	int seccomp, nnp;
};

static struct rights own;

static int read_rights(const char *path, struct rights *r)
{
	char line[256];
	FILE *f = fopen(path, "r");

	memset(r, 0, sizeof *r);
	if (!f)
		return -1;
	while (fgets(line, sizeof line, f)) {
		sscanf(line, "Name: %31[^\n]", r->name);
		sscanf(line, "CapPrm: %lx", &r->prm);
		sscanf(line, "CapEff: %lx", &r->eff);
		sscanf(line, "CapBnd: %lx", &r->bnd);
		sscanf(line, "Seccomp: %d", &r->seccomp);
		sscanf(line, "NoNewPrivs: %d", &r->nnp);
	}
	fclose(f);
	return 0;
}

static long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec;
}

static int reached;

static int more(const struct rights *r)
{
	return ((r->prm | r->eff | r->bnd) & ~own.bnd) || r->seccomp < own.seccomp || r->nnp < own.nnp;
}

static void tell(int pid, int tid, const struct rights *r, const char *exe, int fd)
{
	reached++;
	printf("reached: pid %d thread %d %s exe %s CapPrm %lx CapEff %lx CapBnd %lx Seccomp %d descriptor %d\n",
	       pid, tid, r->name, exe, r->prm, r->eff, r->bnd, r->seccomp, fd);
	fflush(stdout);
}

/* look at the process that is ours now. */
static void look(int pid)
{
	char path[300], exe[200] = "?";
	struct rights r;
	struct dirent *e;
	int pidfd, fd, n;
	DIR *tasks;

	snprintf(path, sizeof path, "/proc/%d/exe", pid);
	n = readlink(path, exe, sizeof exe - 1);
	exe[n > 0 ? n : 0] = 0;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	tasks = opendir(path);
	while (tasks && (e = readdir(tasks))) {
		if (e->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, e->d_name);
		if (read_rights(path, &r) == 0 && more(&r))
			tell(pid, atoi(e->d_name), &r, exe, -1);
	}
	if (tasks)
		closedir(tasks);
	if (strncmp(exe, "/memfd:", 7))
		return;
	/* Still the runtime's program: whatever it holds is not the container's. */
	pidfd = syscall(SYS_pidfd_open, pid, 0);
	for (n = 3; pidfd >= 0 && n < 16; n++) {
		fd = syscall(SYS_pidfd_getfd, pidfd, n, 0);
		if (fd >= 0) {
			snprintf(path, sizeof path, "/proc/%d/status", pid);
			read_rights(path, &r);
			tell(pid, pid, &r, exe, n);
			close(fd);
		}
	}
	close(pidfd);
}

static int last_pid(int f)
{
	char text[128], *s;
	int n = pread(f, text, sizeof text - 1, 0);

	if (n <= 0)
		return 0;
	text[n] = 0;
	s = strrchr(text, ' ');
	return s ? atoi(s) : 0;
}

int main(int argc, char **argv)
{
	int f = open("/proc/loadavg", O_RDONLY), last = last_pid(f), status, i, caught = 0;
	long end = now() + atoi(argv[1]);

	(void)argc;
	read_rights("/proc/self/status", &own);
	printf("ready, last pid %d, CapBnd %lx, Seccomp %d\n", last, own.bnd, own.seccomp);
	fflush(stdout);
	for (unsigned long round = 0; now() < end; round++) {
		if (round % 16 == 0) {
			int seen = last_pid(f);

			if (seen > last + 8 || seen < last) /* we were too slow, or it wrapped */
				last = seen;
		}
		for (i = 1; i <= 4; i++) {
			int pid = last + i;

			if (ptrace(PTRACE_SEIZE, pid, 0, 0))
				continue;
			caught++;
			last = pid;
			ptrace(PTRACE_INTERRUPT, pid, 0, 0);
			for (;;) {
				int got = waitpid(pid, &status, __WALL);

				if (got == pid && WIFSTOPPED(status)) {
					look(pid);
					ptrace(PTRACE_DETACH, pid, 0, 0);
					break;
				}
				if (got < 0 && errno == EINTR)
					continue;
				break;
			}
			break;
		}
	}
	printf("caught %d, reached %d\n", caught, reached);
	return 0;
}
