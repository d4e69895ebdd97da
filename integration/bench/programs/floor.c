// The floor of a container start: clone into new namespaces, mount a root file
// system with /proc, /dev and /sys, pivot into it and execute the payload.
//   floor ROOTFS PAYLOAD STAMP-NAME ; the caller reads ROOTFS/out/STAMP-NAME
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define must(e) do { if ((e) < 0) { perror(#e); _exit(1); } } while (0)
static char stack[1 << 16];
static char **args;

static int child(void *unused) {
	(void)unused;
	must(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0));
	must(mount(args[1], args[1], 0, MS_BIND | MS_REC, 0));
	must(chdir(args[1]));
	must(mount("proc", "proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, 0));
	must(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"));
	must(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, 0));
	must(syscall(SYS_pivot_root, ".", "."));
	must(umount2(".", MNT_DETACH));
	must(chdir("/"));
	char *argv[] = {args[2], args[3], 0};
	must(execve(args[2], argv, (char *[]){0}));
	return 1;
}

int main(int argc, char **argv) {
	if (argc != 4) return 2;
	args = argv;
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	printf("%ld\n", t.tv_sec * 1000000000L + t.tv_nsec);
	fflush(stdout);
	int pid = clone(child, stack + sizeof stack,
		CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | SIGCHLD, 0);
	must(pid);
	printf("%d\n", pid);
	fflush(stdout);
	int status;
	waitpid(pid, &status, 0);
	return 0;
}
