package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxPasswd bounds what is read of an image's user database, which is
// untrusted input.
const maxPasswd = 4 << 20

// specUser resolves who the process is. The request's user wins over the
// image's; names are looked up in the container's own files.
func (s *Service) specUser(_ context.Context, in *specInput, spec *specs.Spec) error {
	db, err := openUsers(in.rootfs)
	if err != nil {
		return err
	}
	defer db.close()
	sc := in.security()
	who, err := userString(sc, in.image.Config.Config.User)
	if err != nil {
		return err
	}
	u := &spec.Process.User
	name := "0"
	if who != "" {
		if u.UID, u.GID, err = db.resolve(who); err != nil {
			return err
		}
		name, _, _ = strings.Cut(who, ":")
	}
	var groups []uint32
	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge {
		if groups, err = db.groupsOf(name); err != nil {
			return err
		}
	}
	if who != "" || sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge {
		groups = append(groups, u.GID)
	}
	for _, g := range sc.GetSupplementalGroups() {
		groups = append(groups, uint32(g))
	}
	slices.Sort(groups)
	u.AdditionalGids = slices.Compact(groups)
	return nil
}

// userString is user or user:group of the request, else the image's.
func userString(sc *runtimeapi.LinuxContainerSecurityContext, image string) (string, error) {
	who := ""
	if v := sc.GetRunAsUser(); v != nil {
		who = strconv.FormatInt(v.GetValue(), 10)
	}
	if n := sc.GetRunAsUsername(); n != "" {
		if strings.ContainsAny(n, ":\n\x00") || len(n) > maxName {
			return "", invalid("config.linux.security_context.run_as_username %q", clip(n))
		}
		who = n
	}
	if who == "" {
		return image, nil
	}
	if g := sc.GetRunAsGroup(); g != nil {
		who += ":" + strconv.FormatInt(g.GetValue(), 10)
	}
	return who, nil
}

// users reads the user database of a root file system. It is opened by
// descriptor below the root: a symbolic link at /etc/passwd leads to a file of
// the container's, never to one of the node's.
type users struct{ root int }

func openUsers(rootfs string) (*users, error) {
	fd, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root file system %s: %w", rootfs, err)
	}
	return &users{fd}, nil
}

func (u *users) close() { _ = unix.Close(u.root) }

// open returns a file of the container's, or nil where it has none.
func (u *users) open(path string) (*os.File, error) {
	fd, err := unix.Openat2(u.root, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open /%s of the image: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return nil, invalid("/%s of the image is no regular file", path)
	}
	return f, nil
}

func (u *users) passwd(match func(user.User) bool) (*user.User, error) {
	f, err := u.open("etc/passwd")
	if f == nil {
		return nil, err
	}
	defer f.Close()
	found, err := user.ParsePasswdFilter(io.LimitReader(f, maxPasswd), match)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return &found[0], nil
}

func (u *users) group(match func(user.Group) bool) ([]user.Group, error) {
	f, err := u.open("etc/group")
	if f == nil {
		return nil, err
	}
	defer f.Close()
	return user.ParseGroupFilter(io.LimitReader(f, maxPasswd), match)
}

// resolve turns user, uid, user:group in names or numbers into ids. A number
// needs no entry; with one its group is taken when none is given.
func (u *users) resolve(who string) (uid, gid uint32, err error) {
	name, group, hasGroup := strings.Cut(who, ":")
	if strings.Contains(group, ":") || name == "" || (hasGroup && group == "") {
		return 0, 0, invalid("user %q: want user, or user:group", clip(who))
	}
	id, number, err := parseID(name)
	if err != nil {
		return 0, 0, invalid("user %q: %v", clip(who), err)
	}
	if number && hasGroup {
		uid = id
	} else {
		e, err := u.passwd(func(e user.User) bool {
			if number {
				return e.Uid == int(id)
			}
			return e.Name == name
		})
		switch {
		case err != nil:
			return 0, 0, fmt.Errorf("user %q: %w", clip(who), err)
		case e == nil && !number:
			return 0, 0, invalid("user %q: not in /etc/passwd of the image", clip(name))
		case e == nil:
			uid = id
		default:
			if e.Uid < 0 || e.Uid > maxUID || e.Gid < 0 || e.Gid > maxUID {
				return 0, 0, invalid("user %q: ids %d and %d in /etc/passwd of the image are out of range", clip(name), e.Uid, e.Gid)
			}
			uid, gid = uint32(e.Uid), uint32(e.Gid)
		}
	}
	if !hasGroup {
		return uid, gid, nil
	}
	if gid, number, err = parseID(group); err != nil {
		return 0, 0, invalid("group of user %q: %v", clip(who), err)
	}
	if number {
		return uid, gid, nil
	}
	gs, err := u.group(func(g user.Group) bool { return g.Name == group })
	if err != nil {
		return 0, 0, fmt.Errorf("group %q: %w", clip(group), err)
	}
	if len(gs) == 0 {
		return 0, 0, invalid("group %q: not in /etc/group of the image", clip(group))
	}
	if gs[0].Gid < 0 || gs[0].Gid > maxUID {
		return 0, 0, invalid("group %q: id %d in /etc/group of the image is out of range", clip(group), gs[0].Gid)
	}
	return uid, uint32(gs[0].Gid), nil
}

// parseID tells numbers from names. A number that is out of range is an error
// and never a name: 2^32 would wrap to root (CVE-2024-40635).
func parseID(s string) (uint32, bool, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	var num *strconv.NumError
	if errors.As(err, &num) && errors.Is(num.Err, strconv.ErrSyntax) {
		return 0, false, nil
	}
	if err != nil || n < 0 || n > maxUID {
		return 0, true, fmt.Errorf("id %s is out of range 0 to %d", clip(s), maxUID)
	}
	return uint32(n), true, nil
}

// groupsOf returns the groups that /etc/group lists a user in.
func (u *users) groupsOf(who string) ([]uint32, error) {
	name := who
	if id, number, err := parseID(who); err == nil && number {
		e, err := u.passwd(func(e user.User) bool { return e.Uid == int(id) })
		if err != nil || e == nil {
			return nil, err
		}
		name = e.Name
	}
	gs, err := u.group(func(g user.Group) bool {
		return g.Name != name && slices.Contains(g.List, name)
	})
	if err != nil {
		return nil, fmt.Errorf("groups of %q: %w", clip(name), err)
	}
	var out []uint32
	for _, g := range gs {
		if g.Gid < 0 || g.Gid > maxUID {
			continue // no process can have it
		}
		out = append(out, uint32(g.Gid))
	}
	return out, nil
}
