/* probe: the tests' payload. probe now | probe call NR [ARG…] | probe eat MiB | probe lines N SIZE */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

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
