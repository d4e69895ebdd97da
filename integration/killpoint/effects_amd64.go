package killpoint

import "golang.org/x/sys/unix"

// older calls are those that newer architectures have in a later form only.
var older = map[int]kind{
	unix.SYS_OPEN:      {"open", func(c *call) (string, bool) { return c.path(0), creates(c.args[1]) }},
	unix.SYS_CREAT:     {"creat", at(path(0))},
	unix.SYS_RENAME:    {"rename", at(path(1))},
	unix.SYS_UNLINK:    {"unlink", at(path(0))},
	unix.SYS_RMDIR:     {"rmdir", at(path(0))},
	unix.SYS_MKDIR:     {"mkdir", at(path(0))},
	unix.SYS_MKNOD:     {"mknod", at(path(0))},
	unix.SYS_LINK:      {"link", at(path(1))},
	unix.SYS_SYMLINK:   {"symlink", at(path(1))},
	unix.SYS_CHOWN:     {"chown", at(path(0))},
	unix.SYS_LCHOWN:    {"lchown", at(path(0))},
	unix.SYS_CHMOD:     {"chmod", at(path(0))},
	unix.SYS_UTIMES:    {"utimes", at(path(0))},
	unix.SYS_FUTIMESAT: {"futimesat", at(path(1))},
	unix.SYS_FORK:      {"fork", nil},
	unix.SYS_VFORK:     {"vfork", nil},
}
