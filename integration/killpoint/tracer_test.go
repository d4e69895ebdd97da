package killpoint

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const dirEnv = "KILLPOINT_TEST_DIR"

const made = 12 // directories, by as many threads

func TestMain(m *testing.M) {
	if dir := os.Getenv(dirEnv); dir != "" {
		makeDirs(dir)
		return
	}
	os.Exit(m.Run())
}

// makeDirs makes directories once it is told to, a program's end between them.
func makeDirs(dir string) {
	in := bufio.NewReader(os.Stdin)
	fmt.Println("begun")
	in.ReadString('\n')
	var wg sync.WaitGroup
	for i := range made {
		wg.Go(func() { unix.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o700) })
	}
	wg.Wait()
	exec.Command("/bin/true").Run()
	fmt.Println("ended")
	in.ReadString('\n')
}

// work lets a program make its directories under an aim.
func work(t *testing.T, aim Aim) (dirs int, points []Point, struck *Point) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("ptrace needs root")
	}
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), dirEnv+"="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	said := bufio.NewReader(out)
	said.ReadString('\n')
	trace, err := Start(cmd.Process.Pid, aim)
	if err != nil {
		cmd.Process.Kill()
		t.Fatal(err)
	}
	fmt.Fprintln(in)
	said.ReadString('\n') // or its end
	for deadline := time.Now().Add(10 * time.Second); aim.Point != 0 && trace.Struck() == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	points, struck = trace.Stop(), trace.Struck()
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(found), points, struck
}

func TestCallsWithAnEffectAreCounted(t *testing.T) {
	dirs, points, struck := work(t, Aim{})
	counts := map[string]int{}
	for _, p := range points {
		var name string
		fmt.Sscan(p.Call, &name)
		counts[name]++
	}
	if dirs != made || struck != nil || counts["mkdirat"]+counts["mkdir"] != made {
		t.Errorf("%d directories, struck %v, points %v", dirs, struck, points)
	}
	if counts["clone"]+counts["clone3"] == 0 || counts["execve"] != 0 {
		t.Errorf("threads are no processes, and of its child nothing counts: %v", points)
	}
}

// TestProgramDiesBeforeOrAfterItsCall looks for the directory of the call itself:
// calls of other threads may be under way meanwhile.
func TestProgramDiesBeforeOrAfterItsCall(t *testing.T) {
	for n := range made {
		for _, after := range []bool{false, true} {
			_, points, struck := work(t, Aim{Point: n + 1, After: after})
			if struck == nil {
				t.Fatalf("point %d was not reached: %v", n+1, points)
			}
			_, err := os.Stat(strings.Fields(struck.Call)[1])
			if done := err == nil; done != after {
				t.Errorf("%v, after it %v: the directory is there: %v", struck, after, done)
			}
		}
	}
}
