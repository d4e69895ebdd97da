// The payload of the benchmarks: writes the time of its first act and waits.
// Built without libc so that what is measured is the road to it, not itself.
//   cc -nostdlib -static -Os -o payload payload.c
// It creates /out/<argv[1]> holding CLOCK_REALTIME in nanoseconds.
static long sys(long n, long a, long b, long c, long d) {
	long r;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return r;
}
enum { READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, PAUSE = 34, EXIT = 60, CLOCK_GETTIME = 228 };

__attribute__((used)) static void run(long *sp) {
	long argc = sp[0];
	char **argv = (char **)(sp + 1);
	struct { long s, ns; } t;
	sys(CLOCK_GETTIME, 0, (long)&t, 0, 0);
	if (argc < 2) // an exec of it: be over at once
		sys(EXIT, 0, 0, 0, 0);
	char path[256] = "/out/", digits[32];
	int n = 5;
	for (char *p = argv[1]; *p && n < 255; p++) path[n++] = *p;
	path[n] = 0;
	int i = 32;
	for (long v = t.s * 1000000000L + t.ns; v; v /= 10) digits[--i] = '0' + v % 10;
	long fd = sys(OPEN, (long)path, 01101 /* O_WRONLY|O_CREAT|O_TRUNC */, 0644, 0);
	if (fd >= 0) { // as a peer's pause it has nowhere to write
		sys(WRITE, fd, (long)(digits + i), 32 - i, 0);
		sys(CLOSE, fd, 0, 0, 0);
	}
	for (;;) sys(PAUSE, 0, 0, 0, 0);
}
__asm__(".globl _start\n_start:\n mov %rsp,%rdi\n and $-16,%rsp\n call run\n");
