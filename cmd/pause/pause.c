/*
 * pause: holds the namespaces of one pod and nothing else.
 *
 * It has no libc so that it costs two pages of memory. podd-shim starts it in
 * the new namespaces with four descriptors:
 *
 *   3     status, a socket: an error text is written here, or READY. Then one byte
 *         is waited for: it says that the shim has a record of us. When the
 *         socket closes instead, nobody would ever end us, so we do.
 *   4, 5  the two ends of a socket pair that the shim uses as a store for the
 *         descriptors of the pod's containers; pause never looks at them
 *   6     an empty directory, the root of a mount that is nowhere in the tree
 *
 * Arguments: h=HOSTNAME  d=DOMAINNAME  s=/proc/sys/PATH=VALUE
 *            l=LSM_ATTR_FILE=TEXT (confines pause itself)
 *
 * As PID 1 of a shared PID namespace it reaps what is orphaned there.
 */
#include <linux/capability.h>
#include <linux/fcntl.h>
#include <linux/prctl.h>
#include <linux/signal.h>
#include <linux/wait.h>
#include "sys.h"

enum { READY = 'k' };
enum { STATUS = 3, EMPTY = 6, NOBODY = 65535, EINTR_ = 4, EINVAL_ = 22 };

static void say(const char *s) { sys3(__NR_write, STATUS, s, len(s)); }

static void fail(const char *what, const char *which, long err)
{
	char num[24];
	int i = sizeof num - 1;

	num[i] = 0;
	err = -err;
	do {
		num[--i] = '0' + err % 10;
		err /= 10;
	} while (err && i);
	say(what);
	say(" ");
	say(which);
	say(": errno ");
	say(num + i);
	sys1(__NR_exit_group, 1);
}

/* put writes text to the file; arg is FILE=TEXT and is cut at the sign. */
static void put(const char *what, char *arg)
{
	char *text = arg;
	long fd, n;

	while (*text && *text != '=')
		text++;
	if (!*text)
		fail(what, arg, -EINVAL_);
	*text++ = 0;
	fd = sys4(__NR_openat, AT_FDCWD, arg, O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0);
	if (fd < 0)
		fail(what, arg, fd);
	n = sys3(__NR_write, fd, text, len(text));
	if (n < 0)
		fail(what, arg, n);
	sys1(__NR_close, fd);
}

static void confine(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct none[2] = { { 0, 0, 0 }, { 0, 0, 0 } };
	long cap, err;

	/* Who may trace us reaches our root directory by /proc/1/root, and ".."
	 * leads out of one that is a part of the node's tree: so it is none. */
	err = sys1(__NR_fchdir, EMPTY);
	if (err < 0)
		fail("fchdir", "empty root", err);
	err = sys1(__NR_chroot, ".");
	if (err < 0)
		fail("chroot", "empty root", err);
	/* That one, and whatever the shim's starter has left open. */
	if (sys3(__NR_close_range, EMPTY, ~0U, 0) < 0)
		sys1(__NR_close, EMPTY); /* before Linux 5.9 */
	for (cap = 0; cap < 64; cap++)
		if (sys5(__NR_prctl, PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			break; /* beyond the last one */
	sys2(__NR_setgroups, 0, 0);
	/* Ids outside of a small user namespace's mapping: stay its root. */
	sys3(__NR_setresgid, NOBODY, NOBODY, NOBODY);
	sys3(__NR_setresuid, NOBODY, NOBODY, NOBODY);
	err = sys2(__NR_capset, &head, none);
	if (err < 0)
		fail("capset", "", err);
	err = sys5(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (err < 0)
		fail("prctl", "no_new_privs", err);
	/* Nobody of the pod may take the stored descriptors by ptrace. */
	err = sys5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
	if (err < 0)
		fail("prctl", "dumpable", err);
}

/* ready waits until the shim has taken note of us. */
static void ready(void)
{
	char c = READY;
	long n;

	sys3(__NR_write, STATUS, &c, 1);
	do
		n = sys3(__NR_read, STATUS, &c, 1);
	while (n == -EINTR_);
	if (n != 1)
		sys1(__NR_exit_group, 1);
	sys1(__NR_close, STATUS);
}

__attribute__((noreturn, used)) void run(long *stack)
{
	long argc = stack[0], i, err;
	char **argv = (char **)(stack + 1);
	char *lsm = 0;
	u64 all = ~0UL;

	/* No handlers: all signals wait to be fetched below. */
	sys4(__NR_rt_sigprocmask, SIG_BLOCK, &all, 0, sizeof all);
	sys5(__NR_prctl, PR_SET_NAME, "pause", 0, 0, 0);
	sys0(__NR_setsid);
	for (i = 1; i < argc; i++) {
		char *arg = argv[i] + 2;

		switch (argv[i][0]) {
		case 'h':
			err = sys2(__NR_sethostname, arg, len(arg));
			if (err < 0)
				fail("set hostname", arg, err);
			break;
		case 'd':
			err = sys2(__NR_setdomainname, arg, len(arg));
			if (err < 0)
				fail("set domainname", arg, err);
			break;
		case 's':
			put("set sysctl", arg);
			break;
		case 'l':
			lsm = arg;
			break;
		default:
			fail("unknown argument", argv[i], -EINVAL_);
		}
	}
	if (lsm)
		put("confine by", lsm);
	confine();
	ready();

	for (;;) {
		long sig = sys4(__NR_rt_sigtimedwait, &all, 0, 0, sizeof all);

		if (sig == SIGCHLD)
			while (sys4(__NR_wait4, -1, 0, WNOHANG, 0) > 0)
				;
		else if (sig == SIGTERM || sig == SIGINT)
			sys1(__NR_exit_group, 0);
	}
}
