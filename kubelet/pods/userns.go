package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// userIDs are the host's user and group ids from which pods with hostUsers:
// false get theirs (KEP-127).
type userIDs struct {
	// first id, and how many there are; both multiples of perPod.
	first, count uint64
	// perPod ids for each pod, a multiple of 65536.
	perPod uint64
}

// usernsUnit is what the ids of a pod are a multiple of.
const usernsUnit = 65536

// hostUserIDs are those that /etc/subuid and /etc/subgid give to the user
// kubelet, as with upstream; without such a user all but the first perPod.
// perPod 0 is 65536. errdefs.ErrInvalidArgument: the ranges cannot be used.
func hostUserIDs(perPod int64) (userIDs, error) {
	if perPod == 0 {
		perPod = usernsUnit
	}
	if perPod < usernsUnit || perPod%usernsUnit != 0 || perPod > 1<<31 {
		return userIDs{}, fmt.Errorf("userNamespaces.idsPerPod %d: want a multiple of %d: %w", perPod, usernsUnit, errdefs.ErrInvalidArgument)
	}
	ids := userIDs{first: uint64(perPod), perPod: uint64(perPod)}
	ids.count = 1<<32 - ids.first - ids.perPod // the last id of 32 bits is none
	if _, err := user.Lookup("kubelet"); err != nil {
		return ids, nil
	}
	program, err := exec.LookPath("getsubids")
	if err != nil {
		return ids, nil
	}
	uids, err := exec.Command(program, "kubelet").Output()
	if err != nil {
		return ids, fmt.Errorf("getsubids kubelet: %w", err)
	}
	gids, err := exec.Command(program, "-g", "kubelet").Output()
	if err != nil {
		return ids, fmt.Errorf("getsubids -g kubelet: %w", err)
	}
	if string(uids) != string(gids) {
		return ids, fmt.Errorf("the user kubelet has other subordinate user ids than group ids: %w", errdefs.ErrInvalidArgument)
	}
	return parseSubIDs(string(uids), ids.perPod)
}

// parseSubIDs reads the one line that getsubids(1) may say: "0: kubelet 65536 7208960".
func parseSubIDs(out string, perPod uint64) (userIDs, error) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 1 {
		return userIDs{}, fmt.Errorf("the user kubelet has %d ranges of subordinate ids, want one: %w", len(lines), errdefs.ErrInvalidArgument)
	}
	ids := userIDs{perPod: perPod}
	var name string
	var n int
	if _, err := fmt.Sscanf(lines[0], "%d: %s %d %d", &n, &name, &ids.first, &ids.count); err != nil {
		return userIDs{}, fmt.Errorf("subordinate ids %q: %w", lines[0], err)
	}
	if ids.first == 0 || ids.first%perPod != 0 || ids.count < perPod || ids.count%perPod != 0 || ids.first+ids.count > 1<<32 {
		return userIDs{}, fmt.Errorf("subordinate ids %q of the user kubelet: begin and length must be multiples of %d: %w", lines[0], perPod, errdefs.ErrInvalidArgument)
	}
	return ids, nil
}

// userns hands out ranges of ids. What a pod has is in the file userns of its
// directory, in upstream's format, and lasts as long as the directory.
type userns struct {
	ids    userIDs
	podDir func(types.UID) string

	mu   sync.Mutex           // held over no file
	used map[uint64]types.UID // by first id
}

type usernsFile struct {
	UIDMappings []usernsMapping `json:"uidMappings"`
	GIDMappings []usernsMapping `json:"gidMappings"`
}

type usernsMapping struct {
	HostID      uint32 `json:"hostId"`
	ContainerID uint32 `json:"containerId"`
	Length      uint32 `json:"length"`
}

const usernsName = "userns"

// wantsUserns says that the pod's users are not the host's.
func wantsUserns(pod *v1.Pod) bool { return pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers }

// get the pod's ids, new ones for a pod that has none; nil: the host's.
func (u *userns) get(pod *v1.Pod) (*runtimeapi.UserNamespace, error) {
	if !wantsUserns(pod) {
		return nil, nil
	}
	first, length, err := u.read(pod.UID)
	if errors.Is(err, fs.ErrNotExist) {
		length = u.ids.perPod
		first, err = u.begin(pod.UID)
	}
	if err == nil {
		err = u.hold(first, pod.UID)
	}
	if err != nil {
		return nil, fmt.Errorf("user namespace of pod %s: %w", pod.UID, err)
	}
	m := []*runtimeapi.IDMapping{{HostId: uint32(first), ContainerId: 0, Length: uint32(length)}}
	return &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: m, Gids: m}, nil
}

// begin a range for a pod that has none. The file is written with nobody
// waiting: it is synced, which a slow disk takes its time for.
func (u *userns) begin(uid types.UID) (first uint64, err error) {
	u.mu.Lock()
	if first, err = u.pick(); err == nil {
		u.used[first] = uid
	}
	u.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if err := u.write(uid, first); err != nil {
		u.mu.Lock()
		delete(u.used, first)
		u.mu.Unlock()
		return 0, err
	}
	return first, nil
}

// hold a range for a pod, unless it is another's.
func (u *userns) hold(first uint64, uid types.UID) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if owner, taken := u.used[first]; taken && owner != uid {
		return fmt.Errorf("its ids from %d are pod %s's: %w", first, owner, errdefs.ErrAlreadyExists)
	}
	u.used[first] = uid
	return nil
}

// pick the first range that is free.
func (u *userns) pick() (uint64, error) {
	for first := u.ids.first; first+u.ids.perPod <= u.ids.first+u.ids.count; first += u.ids.perPod {
		if _, taken := u.used[first]; !taken {
			return first, nil
		}
	}
	return 0, fmt.Errorf("all %d ranges of user ids are in use: %w", u.ids.count/max(u.ids.perPod, 1), errdefs.ErrUnavailable)
}

func (u *userns) read(uid types.UID) (first, length uint64, err error) {
	data, err := os.ReadFile(filepath.Join(u.podDir(uid), usernsName))
	if err != nil {
		return 0, 0, err
	}
	var f usernsFile
	if err := json.Unmarshal(data, &f); err != nil {
		return 0, 0, err
	}
	if len(f.UIDMappings) != 1 || len(f.GIDMappings) != 1 || f.UIDMappings[0] != f.GIDMappings[0] ||
		f.UIDMappings[0].ContainerID != 0 || f.UIDMappings[0].HostID == 0 || f.UIDMappings[0].Length%usernsUnit != 0 {
		return 0, 0, fmt.Errorf("%s is not one of ours: %w", usernsName, errdefs.ErrInvalidArgument)
	}
	return uint64(f.UIDMappings[0].HostID), uint64(f.UIDMappings[0].Length), nil
}

// write durably: ids that are in use must be known after a power cut, files
// belong to them.
func (u *userns) write(uid types.UID, first uint64) error {
	dir := u.podDir(uid)
	m := []usernsMapping{{HostID: uint32(first), Length: uint32(u.ids.perPod)}}
	data, err := json.Marshal(usernsFile{UIDMappings: m, GIDMappings: m})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, usernsName+".*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err := errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), filepath.Join(dir, usernsName)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// release the ids of a pod whose directory is gone.
func (u *userns) release(uid types.UID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for first, owner := range u.used {
		if owner == uid {
			delete(u.used, first)
		}
	}
}

// recover what the pods that are on disk have.
func (u *userns) recover(uids []types.UID) (problems []error) {
	u.mu.Lock() // nobody waits yet
	defer u.mu.Unlock()
	for _, uid := range uids {
		first, length, err := u.read(uid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("user namespace of pod %s: %w", uid, err))
			continue
		}
		// Of another size than now it may reach into several of today's ranges.
		for id := first - first%u.ids.perPod; id < first+length; id += u.ids.perPod {
			u.used[id] = uid
		}
		u.used[first] = uid
	}
	return problems
}
