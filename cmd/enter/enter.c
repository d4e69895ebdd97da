/*
 * enter: starts a further process in a running container.
 *
 * podd-shim executes it for every exec, from a sealed memfd. It does what
 * libcontainer's nsexec and setns init do, by a plan that the shim has
 * prepared; package cri/shim/internal/enter makes the plan and lists the
 * actions with their counterparts.
 *
 *   shim                 outer (this program)         inner
 *    |-- fork, exec -------->|
 *    |                       | cgroups, limits, LSM attributes
 *    |                       | setns(pidfd of the container's init)
 *    |<-- 't' terminal, -----| terminal, user, capabilities, filter
 *    |    or 'e' and why     | closes all but the streams
 *    |                       |-- clone(CLONE_PARENT, --->| in the PID namespace,
 *    |                       |   CLONE_VFORK)            | a child of the shim
 *    |<== pid, by the kernel-|                           | setsid, execve
 *    |<-- exit --------------| when that is done         |
 *
 * Descriptors: 0, 1, 2  the process's
 *              3        status, a SOCK_SEQPACKET socket
 *              4        the plan
 *              5        pidfd of the container's init
 *
 * Who in the container may trace (CAP_SYS_PTRACE) owns inner from its birth: no
 * flag of a process keeps its namespace's tracers away. So inner is born with
 * nothing that the executed program will not have: its user, its capabilities
 * and bounding set, its filter, its three descriptors, and memory of its own.
 * Outer never is in the container's PID namespace, so nobody there can name it;
 * it alone speaks to the shim, and the kernel itself writes inner's number into
 * the first page of the plan, which inner does not get.
 */
#include <asm/errno.h>
#include <asm/ioctls.h>
#include <asm/stat.h>
#include <asm/statfs.h>
#include <asm/termios.h>
#include <linux/capability.h>
#include <linux/fcntl.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/magic.h>
#include <linux/mman.h>
#include <linux/openat2.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/stat.h>
#include "sys.h"

#ifndef AT_EMPTY_PATH
#define AT_EMPTY_PATH 0x1000
#endif
#define AT_EACCESS 0x200

enum { STATUS = 3, PLAN = 4, INIT = 5, FIRST_UNUSED = 6, PATH_MAX = 4096 };

/* The plan, native endian. Offsets are from its start; 0 stands for nothing. */
enum { MAGIC = 0x706f6465 };

enum {
	F_OOM = 1,
	F_CAPS = 2,
	F_NO_NEW_PRIVS = 4,
	F_UMASK = 8,
	F_PERSONALITY = 16,
	F_IOPRIO = 32,
	F_TTY = 64,
	F_HOME = 128,
	F_USERNS = 256,
};

struct span {
	u32 off, n;
};

struct plan {
	u32 magic, size;
	s32 child, err; /* for the shim: inner's pid, or why there is none */
	u32 flags, ns;  /* ns: what setns(2) shall join */
	u32 uid, gid;
	s32 oom;
	u32 umask, personality, ioprio;
	u32 rows, cols;
	u32 filter_flags;
	u32 keyring, cwd, path; /* strings; path is $PATH */
	u64 bounding, effective, permitted, inheritable, ambient;
	struct span cgroups; /* offsets of file names to write "0" to */
	struct span attrs;   /* pairs of offsets: file, text */
	struct span rlimits; /* struct rlimit_order */
	struct span initial, final; /* bytes of CPU masks */
	struct span sched;   /* bytes of struct sched_attr */
	struct span groups;  /* u32 */
	struct span filter;  /* struct sock_filter */
	struct span argv, envp; /* offsets; two more entries than n, of zero */
};

struct rlimit_order {
	u64 resource, soft, hard;
};

_Static_assert(sizeof(struct plan) == 192, "package enter encodes this");

static struct plan *plan;   /* our copy */
static struct plan *shared; /* its first page, which the shim sees, too */

static void *at(u32 off) { return (char *)plan + off; }

/* A message: its kind, an errno and a text. */
struct message {
	s32 kind, err;
	char text[512];
};

static void tell(int kind, long err, const char *a, const char *b)
{
	struct message m;
	u32 n = 0;

	m.kind = kind;
	m.err = (s32)err;
	for (; *a && n < sizeof m.text; a++)
		m.text[n++] = *a;
	if (b && n < sizeof m.text)
		m.text[n++] = ' ';
	for (; b && *b && n < sizeof m.text; b++)
		m.text[n++] = *b;
	sys3(__NR_write, STATUS, &m, __builtin_offsetof(struct message, text) + n);
}

__attribute__((noreturn)) static void leave(int code)
{
	for (;;)
		sys1(__NR_exit_group, code);
}

/* fail reports why there will be no process. */
__attribute__((noreturn)) static void fail(const char *what, const char *which, long err)
{
	tell('e', -err, what, which);
	leave(255);
}

static long check(long r, const char *what, const char *which)
{
	if (r < 0)
		fail(what, which, r);
	return r;
}

/* unable leaves this exec to libcontainer; nothing has been done yet that lasts. */
__attribute__((noreturn)) static void unable(const char *what, long err)
{
	tell('f', -err, what, 0);
	leave(255);
}

/* gone reports what fails so when the container has just ended. */
__attribute__((noreturn)) static void gone(const char *what, long err)
{
	tell('d', -err, what, 0);
	leave(255);
}

static long file_stat(int fd, struct stat *st)
{
	return sys4(__NR_newfstatat, fd, "", st, AT_EMPTY_PATH);
}

/* put writes text to a file of the node. */
static long put(const char *file, const char *text)
{
	long fd = sys4(__NR_openat, AT_FDCWD, file, O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0), r;

	if (fd < 0)
		return fd;
	r = sys3(__NR_write, fd, text, len(text));
	sys1(__NR_close, fd);
	return r;
}

static const char *decimal(long v, char *buf, int size)
{
	u64 u = v < 0 ? -v : v;
	int i = size - 1;

	buf[i] = 0;
	do {
		buf[--i] = '0' + u % 10;
		u /= 10;
	} while (u);
	if (v < 0)
		buf[--i] = '-';
	return buf + i;
}

static __attribute__((aligned(16))) u64 all_cpus[1024 / sizeof(u64)];

/* map_plan maps the plan, and apart from it what the shim reads. */
static void map_plan(void)
{
	long size = check(sys3(__NR_lseek, PLAN, 0, 2 /* SEEK_END */), "read plan", 0), r;

	r = sys6(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_POPULATE, PLAN, 0);
	if (r < 0 && r > -PATH_MAX)
		fail("map plan", 0, r);
	plan = (struct plan *)r;
	if (size < (long)sizeof *plan || plan->magic != MAGIC || plan->size != size)
		fail("plan on descriptor 4", 0, -EINVAL);
	r = sys6(__NR_mmap, 0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, PLAN, 0);
	if (r < 0 && r > -PATH_MAX)
		fail("map plan", 0, r);
	shared = (struct plan *)r;
	check(sys3(__NR_madvise, shared, sizeof *shared, MADV_DONTFORK), "keep plan from inner", 0);
}

/* prepare does what takes the shim's place in the tree: cgroups, limits, LSM. */
static void prepare(void)
{
	char num[16];
	u64 none = 0, *offs;
	struct rlimit_order *limit;
	long r;
	u32 i;

	sys4(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &none, 0, sizeof none);

	if (plan->initial.n)
		check(sys3(__NR_sched_setaffinity, 0, plan->initial.n, at(plan->initial.off)),
		      "error setting initial CPU affinity", 0);
	offs = at(plan->cgroups.off);
	for (i = 0; i < plan->cgroups.n; i++)
		check(put(at(offs[i]), "0"), "error adding process to cgroup", at(offs[i]));
	if (plan->final.n)
		check(sys3(__NR_sched_setaffinity, 0, plan->final.n, at(plan->final.off)),
		      "error setting final CPU affinity", 0);
	else if (!plan->initial.n) {
		/* More than any kernel's CPUs; it cuts off what it does not have. */
		for (i = 0; i < sizeof all_cpus / sizeof *all_cpus; i++)
			all_cpus[i] = ~0UL;
		sys3(__NR_sched_setaffinity, 0, sizeof all_cpus, all_cpus);
	}
	if (plan->flags & F_OOM)
		check(put("/proc/self/oom_score_adj", decimal(plan->oom, num, sizeof num)),
		      "failed to update /proc/self/oom_score_adj", 0);
	/* Kept over fork, used and forgotten by execve. */
	offs = at(plan->attrs.off);
	for (i = 0; i < plan->attrs.n; i++) {
		r = put(at(offs[2 * i]), at(offs[2 * i + 1]));
		if (r < 0)
			fail("write", at(offs[2 * i]), r);
	}
	limit = at(plan->rlimits.off);
	for (i = 0; i < plan->rlimits.n; i++, limit++)
		check(sys4(__NR_prlimit64, 0, limit->resource, &limit->soft, 0),
		      "error setting rlimit type", decimal(limit->resource, num, sizeof num));
}

/* send_terminal gives the master to the shim. */
static void send_terminal(int fd)
{
	struct message m = { .kind = 't' };
	struct {
		void *base;
		u64 len;
	} iov = { &m, __builtin_offsetof(struct message, text) };
	struct {
		u64 len;
		s32 level, type;
		s32 fd, pad;
	} control = { 20, 1 /* SOL_SOCKET */, 1 /* SCM_RIGHTS */, fd, 0 };
	struct {
		void *name;
		u32 namelen, pad;
		void *iov;
		u64 iovlen;
		void *control;
		u64 controllen;
		u32 flags;
	} msg = { 0, 0, 0, &iov, 1, &control, sizeof control, 0 };

	check(sys3(__NR_sendmsg, STATUS, &msg, 0), "send terminal", 0);
}

/*
 * terminal makes a pty of the container's devpts the standard streams; inner
 * makes it its controlling terminal. What is in place of /dev/pts may be hostile: its root
 * is looked at before anything in it is opened, and no mount is crossed.
 */
static void terminal(void)
{
	struct open_how how = { .flags = O_RDWR | O_NOCTTY | O_CLOEXEC,
				.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV };
	struct statfs fs;
	struct stat st;
	struct winsize size = { 0 };
	int unlock = 0, i;
	long dir, master, peer;

	dir = check(sys4(__NR_openat, AT_FDCWD, "/dev/pts", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0),
		    "open", "/dev/pts");
	check(sys2(__NR_fstatfs, dir, &fs), "fstatfs", "/dev/pts");
	check(file_stat(dir, &st), "fstat", "/dev/pts");
	if (fs.f_type != DEVPTS_SUPER_MAGIC || st.st_ino != 1)
		fail("verify ptmx handle: /dev/pts is not a real devpts mount", 0, -ENOTTY);
	master = sys4(__NR_openat2, dir, "ptmx", &how, sizeof how);
	if (master == -ENOSYS)
		unable("openat2", master);
	check(master, "open", "/dev/pts/ptmx");
	check(file_stat(master, &st), "fstat", "/dev/pts/ptmx");
	if ((st.st_mode & S_IFMT) != S_IFCHR || st.st_rdev != (5 << 8 | 2))
		fail("verify ptmx handle: not a real ptmx device", 0, -ENOTTY);
	check(sys3(__NR_ioctl, master, TIOCSPTLCK, &unlock), "unlock terminal", 0);
	peer = check(sys3(__NR_ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC),
		     "failed to get peer end of newly-allocated console", 0);
	if (plan->rows && plan->cols) {
		size.ws_row = plan->rows;
		size.ws_col = plan->cols;
		check(sys3(__NR_ioctl, master, TIOCSWINSZ, &size), "set size of terminal", 0);
	}
	send_terminal(master);
	for (i = 0; i < 3; i++)
		check(sys3(__NR_dup3, peer, i, 0), "dup3", 0);
}

static long number(const char *s, const char *end)
{
	long v = 0;
	int negative = 0;

	if (s < end && (*s == '-' || *s == '+'))
		negative = *s++ == '-';
	if (s == end)
		return 0;
	for (; s < end; s++) {
		if (*s < '0' || *s > '9' || v > 1L << 40)
			return 0;
		v = v * 10 + (*s - '0');
	}
	return negative ? -v : v;
}

static int blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/*
 * home_of_line copies the directory of a passwd(5) line that is uid's. What
 * does not look like a number counts as 0, as libcontainer has it.
 */
static int home_of_line(char *s, char *end, char *home)
{
	char *field[8];
	int n = 0;

	while (s < end && blank(*s))
		s++;
	while (end > s && blank(end[-1]))
		end--;
	if (s == end)
		return 0;
	field[n++] = s;
	for (; s < end && n < 8; s++)
		if (*s == ':')
			field[n++] = s + 1;
	if (n < 8)
		field[n] = end + 1; /* as if a colon followed */
	if ((n > 2 ? number(field[2], (n > 3 ? field[3] : end + 1) - 1) : 0) != (long)plan->uid)
		return 0;
	if (n > 5)
		for (s = field[5]; s < (n > 6 ? field[6] : end + 1) - 1; s++)
			*home++ = *s;
	*home = 0;
	return 1;
}

static char home[8 + PATH_MAX]; /* HOME=... */

/* find_home looks into the container's /etc/passwd; "/" is the default. */
static void find_home(void)
{
	static char buf[PATH_MAX];
	struct stat st;
	char *dir = home;
	long fd, n, have = 0, line, i;

	for (i = 0; i < 5; i++)
		*dir++ = "HOME="[i];
	dir[0] = '/';
	fd = sys4(__NR_openat, AT_FDCWD, "/etc/passwd", O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0);
	if (fd < 0)
		return;
	if (file_stat(fd, &st) == 0 && (st.st_mode & S_IFMT) == S_IFREG)
		for (;;) {
			n = sys3(__NR_read, fd, buf + have, sizeof buf - have);
			if (n == -EINTR)
				continue;
			if (n <= 0) {
				if (n == 0 && have)
					home_of_line(buf, buf + have, dir);
				break;
			}
			have += n;
			for (line = i = 0; i < have; i++)
				if (buf[i] == '\n') {
					if (home_of_line(buf + line, buf + i, dir))
						goto done;
					line = i + 1;
				}
			if (line == 0 && have == sizeof buf)
				break; /* a line that no passwd has */
			for (i = line; i < have; i++)
				buf[i - line] = buf[i];
			have -= line;
		}
done:
	sys1(__NR_close, fd);
}

static void install_filter(void)
{
	struct sock_fprog prog = { plan->filter.n, at(plan->filter.off) };

	if (!plan->filter.n)
		return;
	check(sys3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, plan->filter_flags, &prog), "install seccomp filter", 0);
}

/* own gives the user the pipes or the terminal that it gets as streams. */
static void own(void)
{
	struct stat st;
	int fd;
	long r;

	for (fd = 0; fd < 3; fd++) {
		check(file_stat(fd, &st), "fstat of a standard stream", 0);
		if (st.st_uid == plan->uid || ((st.st_mode & S_IFMT) == S_IFCHR && st.st_rdev == (1 << 8 | 3)))
			continue; /* or /dev/null */
		r = sys3(__NR_fchown, fd, plan->uid, -1);
		/* An owner that is not mapped, or a read-only file system. */
		if (r < 0 && r != -EPERM && r != -EROFS)
			fail("chown of a standard stream", 0, r);
	}
}

static void become_user(void)
{
	char num[16];
	long r;

	own();
	r = sys2(__NR_setgroups, plan->groups.n, at(plan->groups.off));
	if (r == -EPERM && (plan->flags & F_USERNS))
		unable("setgroups", r); /* a namespace that denies it */
	check(r, "unable to setup user: setgroups", 0);
	r = sys1(__NR_setgid, plan->gid);
	if (r == -EINVAL)
		fail("unable to setup user: cannot setgid to unmapped gid", decimal(plan->gid, num, sizeof num), r);
	check(r, "unable to setup user: setgid", 0);
	r = sys1(__NR_setuid, plan->uid);
	if (r == -EINVAL)
		fail("unable to setup user: cannot setuid to unmapped uid", decimal(plan->uid, num, sizeof num), r);
	check(r, "unable to setup user: setuid", 0);
}

static void set_capabilities(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	long i, r;

	for (i = 0; i < 2; i++) {
		data[i].effective = (u32)(plan->effective >> 32 * i);
		data[i].permitted = (u32)(plan->permitted >> 32 * i);
		data[i].inheritable = (u32)(plan->inheritable >> 32 * i);
	}
	check(sys2(__NR_capset, &head, data), "unable to apply caps: can't apply capabilities", 0);
	r = sys5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (r < 0 && r != -EINVAL)
		fail("unable to apply caps: clear ambient capabilities", 0, r);
	for (i = 0; i < 64; i++)
		if (plan->ambient >> i & 1) /* one that cannot be raised is left out */
			sys5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0);
}

static long change_dir(void) { return sys1(__NR_chdir, at(plan->cwd)); }

/* verify_cwd: outside of the root, getcwd begins with "(unreachable)" (CVE-2024-21626). */
static void verify_cwd(void)
{
	static char cwd[PATH_MAX + 16];
	long r = sys2(__NR_getcwd, cwd, sizeof cwd);

	if (r == -ENOENT || (r > 0 && cwd[0] != '/'))
		fail("current working directory is outside of container mount namespace root -- possible container breakout detected", 0, -ENOENT);
	check(r, "failed to verify if current working directory is safe", 0);
}

/* executable is Go's os/exec.findExecutable; *missing: there is no such file. */
static long executable(const char *file, int *missing)
{
	struct stat st;
	long r = sys4(__NR_newfstatat, AT_FDCWD, file, &st, 0);

	*missing = r < 0;
	if (r < 0)
		return r;
	if ((st.st_mode & S_IFMT) == S_IFDIR)
		return -EISDIR;
	r = sys4(__NR_faccessat2, AT_FDCWD, file, 1 /* X_OK */, AT_EACCESS);
	if (r == -ENOSYS || r == -EPERM)
		r = st.st_mode & 0111 ? 0 : -EACCES;
	return r;
}

/* find_program is Go's os/exec.LookPath with the process's PATH. */
static const char *find_program(const char *name)
{
	static char file[2 * PATH_MAX];
	const char *dir, *c;
	int missing, n;
	long r;

	for (c = name; *c; c++)
		if (*c == '/') {
			r = executable(name, &missing);
			if (r < 0)
				tell(missing ? 's' : 'x', -r, "", 0), leave(255);
			return name;
		}
	for (dir = plan->path ? at(plan->path) : ""; *dir; dir = *c ? c + 1 : c) {
		n = 0;
		for (c = dir; *c && *c != ':'; c++)
			if (n < PATH_MAX)
				file[n++] = *c;
		if (n == PATH_MAX || !*name)
			continue;
		if (n == 0)
			file[n++] = '.';
		if (file[n - 1] != '/')
			file[n++] = '/';
		for (r = 0; name[r] && n < (int)sizeof file - 1; r++)
			file[n++] = name[r];
		file[n] = 0;
		if (executable(file, &missing) == 0) {
			if (file[0] != '/')
				tell('.', 0, "", 0), leave(255);
			return file;
		}
	}
	tell('n', ENOENT, "", 0);
	leave(255);
}

static const struct {
	int err;
	const char *text;
} errors[] = {
	{ E2BIG, "argument list too long" }, { EACCES, "permission denied" },
	{ EAGAIN, "resource temporarily unavailable" }, { EFAULT, "bad address" },
	{ EINVAL, "invalid argument" }, { EIO, "input/output error" },
	{ EISDIR, "is a directory" }, { ELIBBAD, "accessing a corrupted shared library" },
	{ ELOOP, "too many levels of symbolic links" }, { EMFILE, "too many open files" },
	{ ENAMETOOLONG, "file name too long" }, { ENFILE, "too many open files in system" },
	{ ENOENT, "no such file or directory" }, { ENOEXEC, "exec format error" },
	{ ENOMEM, "cannot allocate memory" }, { ENOTDIR, "not a directory" },
	{ EPERM, "operation not permitted" }, { ETXTBSY, "text file busy" },
};

static void say(const char *s) { sys3(__NR_write, 2, s, len(s)); }

/*
 * execute does not come back. A program that is there and cannot be executed
 * counts as run: exit code 255 with the reason on its standard error.
 */
__attribute__((noreturn)) static void execute(const char *file)
{
	char num[16];
	long r;
	u32 i;

	do
		r = sys3(__NR_execve, file, at(plan->argv.off), at(plan->envp.off));
	while (r == -EINTR);
	say("exec ");
	say(file);
	say(": ");
	for (i = 0; i < sizeof errors / sizeof *errors; i++)
		if (errors[i].err == -r) {
			say(errors[i].text);
			break;
		}
	if (i == sizeof errors / sizeof *errors) {
		say("errno ");
		say(decimal(-r, num, sizeof num));
	}
	say("\n");
	leave(255);
}

static void relocate(struct span s)
{
	u64 *p = at(s.off);
	u32 i;

	for (i = 0; i < s.n; i++)
		p[i] += (u64)plan;
}

/* join becomes a part of the container, in all but the PID namespace. */
static void join(void)
{
	long r = sys2(__NR_setns, INIT, plan->ns);

	if (r == -EINVAL) /* before Linux 5.8 */
		unable("setns by pidfd", r);
	if (r == -ESRCH)
		gone("join namespaces", r);
	check(r, "join namespaces", 0);
	/* Root of the container's user namespace. */
	check(sys3(__NR_setresuid, 0, 0, 0), "failed to become root in user namespace: setresuid", 0);
	check(sys3(__NR_setresgid, 0, 0, 0), "failed to become root in user namespace: setresgid", 0);
	if (plan->keyring) {
		r = sys2(__NR_keyctl, KEYCTL_JOIN_SESSION_KEYRING, at(plan->keyring));
		if (r < 0 && r != -ENOSYS)
			fail("join session keyring", 0, r);
	}
}

/* attributes sets what the program inherits and needs privileges for. */
static void attributes(void)
{
	if (plan->flags & F_NO_NEW_PRIVS)
		check(sys5(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set no_new_privs", 0);
	if (plan->flags & F_UMASK)
		sys1(__NR_umask, plan->umask);
	if (plan->sched.n)
		check(sys3(__NR_sched_setattr, 0, at(plan->sched.off), 0), "error setting scheduler", 0);
	if (plan->flags & F_IOPRIO)
		check(sys3(__NR_ioprio_set, 1 /* IOPRIO_WHO_PROCESS */, 0, plan->ioprio), "failed to set io priority", 0);
	if (plan->flags & F_PERSONALITY)
		check(sys1(__NR_personality, plan->personality), "set_personality", 0);
}

/* drop_rights leaves the user, the directory and the capabilities that the program gets. */
static void drop_rights(void)
{
	long i, r, later = 0;

	if (plan->cwd) {
		r = change_dir();
		later = r == -EPERM || r == -EACCES; /* the user may be allowed what root is not */
		if (r < 0 && !later)
			fail("chdir to cwd", at(plan->cwd), r);
	}
	if (plan->flags & F_CAPS)
		for (i = 0; i < 64; i++)
			if (!(plan->bounding >> i & 1)) {
				r = sys5(__NR_prctl, PR_CAPBSET_DROP, i, 0, 0, 0);
				if (r == -EINVAL)
					break; /* beyond the last one */
				check(r, "unable to apply bounding set", 0);
			}
	check(sys5(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0), "unable to set keep caps", 0);
	become_user();
	if (later)
		check(change_dir(), "chdir to cwd", at(plan->cwd));
	verify_cwd();
	check(sys5(__NR_prctl, PR_SET_KEEPCAPS, 0, 0, 0, 0), "unable to clear keep caps", 0);
	if (plan->flags & F_CAPS)
		set_capabilities();
}

/* inner has the rights of the program already. */
__attribute__((noreturn)) static void inner(const char *file)
{
	sys0(__NR_setsid);
	if (plan->flags & F_TTY)
		sys3(__NR_ioctl, 0, TIOCSCTTY, 0);
	execute(file);
}

__attribute__((noreturn, used)) void run(long *args)
{
	const char *file;
	long r;

	(void)args;
	check(sys5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "set process as non-dumpable", 0);
	sys5(__NR_prctl, PR_SET_NAME, "podd-enter", 0, 0, 0);
	r = sys3(__NR_close_range, FIRST_UNUSED, ~0U, 0);
	if (r < 0) /* before Linux 5.9 */
		unable("close_range", r);
	map_plan();
	prepare();
	join();
	if (plan->flags & F_TTY)
		terminal();
	attributes();
	relocate(plan->argv);
	relocate(plan->envp);
	if (plan->flags & F_HOME) {
		find_home();
		((char **)at(plan->envp.off))[plan->envp.n] = home;
	}
	/* Without no_new_privs this takes CAP_SYS_ADMIN, so it comes now;
	 * otherwise last, so that as little as possible is under it. */
	if (!(plan->flags & F_NO_NEW_PRIVS))
		install_filter();
	drop_rights();
	file = find_program(((char **)at(plan->argv.off))[0]);
	/* Changing the user may have changed it (fs.suid_dumpable). */
	check(sys5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "set process as non-dumpable", 0);
	if (plan->flags & F_NO_NEW_PRIVS)
		install_filter();

	sys3(__NR_close_range, STATUS, ~0U, 0);
	/* No stack: inner goes on with a copy of ours. No exit signal: with
	 * CLONE_PARENT it is that of this process. Outer waits for the execve. */
	r = sys5(__NR_clone, CLONE_PARENT | CLONE_VFORK | CLONE_PARENT_SETTID, 0, &shared->child, 0, 0);
	if (r == 0)
		inner(file);
	if (r < 0)
		shared->err = -r;
	leave(r < 0 ? 255 : 0);
}
