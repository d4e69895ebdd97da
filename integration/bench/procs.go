package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a line of /proc as far as the benchmarks look.
type process struct {
	pid, ppid int
	comm      string
	exe       string
	state     string
	cpu       time.Duration // user and system, of itself alone
	children  time.Duration // of those it has waited for
}

func readProcess(pid int) (process, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	s := string(data)
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	fields := strings.Fields(s[end+1:])
	p := process{pid: pid, comm: s[open+1 : end]}
	p.state = fields[0]
	p.ppid, _ = strconv.Atoi(fields[1])
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	p.cpu = time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 on every Linux
	for _, f := range fields[13:15] {
		n, _ := strconv.Atoi(f)
		p.children += time.Duration(n) * 10 * time.Millisecond
	}
	p.exe, _ = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return p, nil
}

// descendants lists every process below root, root itself excluded.
func descendants(root int) []process {
	entries, _ := filepath.Glob("/proc/[0-9]*")
	children := map[int][]process{}
	for _, e := range entries {
		pid, _ := strconv.Atoi(filepath.Base(e))
		if p, err := readProcess(pid); err == nil {
			children[p.ppid] = append(children[p.ppid], p)
		}
	}
	var all []process
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		for _, p := range children[queue[0]] {
			all = append(all, p)
			queue = append(queue, p.pid)
		}
	}
	return all
}

// pss of a process in bytes: its share of shared pages included.
func pss(pid int) int64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "Pss:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// started holds the processes that exec.Cmd waits for itself.
var started sync.Map

// reapOrphans waits for the zombies that nobody else waits for.
func reapOrphans() {
	for ; ; time.Sleep(50 * time.Millisecond) {
		for _, p := range descendants(os.Getpid()) {
			if _, ours := started.Load(p.pid); p.ppid == os.Getpid() && !ours && p.state == "Z" {
				syscall.Wait4(p.pid, nil, syscall.WNOHANG, nil)
			}
		}
	}
}

// orphansCPU is what the processes used that this one has waited for.
func orphansCPU() time.Duration {
	self, err := readProcess(os.Getpid())
	if err != nil {
		return 0
	}
	return self.children
}
