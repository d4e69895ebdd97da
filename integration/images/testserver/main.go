// Command testserver is what the integration tests run in containers: one
// static program that does what its first argument says.
//
//	testserver serve [ADDR]          HTTP until SIGTERM; default :8080
//	testserver lines [EVERY] [N]     numbered lines, one each EVERY; N or for ever
//	testserver exit CODE [AFTER]     exits with CODE
//	testserver hog MIB               takes that much memory and stays
//	testserver pause                 does nothing until SIGTERM
//	testserver env                   prints the environment and exits
//	testserver write FILE TEXT       writes a file and does nothing until SIGTERM
//	testserver stubborn              ignores SIGTERM
//	testserver counted DIR COMMAND…  notes its start in DIR, then does COMMAND
//	testserver note FILE TEXT [FOR]  adds "TEXT begins" to FILE, and FOR later "TEXT ends"
//	testserver noted FILE TEXT       adds "TEXT begins", and at SIGTERM "TEXT ends"
//
// HTTP: /healthz, /env, /hostname, /pid, /file?path=, /get?url=, /exit?code=,
// /write?path=&text=, /reset (ends the connection by a reset)
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testserver:", err)
		os.Exit(1)
	}
}

func arg(args []string, i int, def string) string {
	if i < len(args) {
		return args[i]
	}
	return def
}

// untilTerm waits for a polite end.
func untilTerm() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	<-c
}

func run(args []string) error {
	switch cmd := arg(args, 0, "serve"); cmd {
	case "serve":
		return serve(arg(args, 1, ":8080"))
	case "lines":
		every, err := time.ParseDuration(arg(args, 1, "10ms"))
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(arg(args, 2, "-1"))
		if err != nil {
			return err
		}
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		tick := time.NewTicker(max(every, 1))
		for i := 0; n < 0 || i < n; i++ {
			// One write a line: no two lines share an entry of the log.
			if _, err := os.Stdout.WriteString("line " + strconv.Itoa(i) + "\n"); err != nil {
				return err
			}
			select {
			case <-tick.C:
			case <-c:
				return nil
			}
		}
		return nil
	case "exit":
		code, err := strconv.Atoi(arg(args, 1, "0"))
		if err != nil {
			return err
		}
		after, err := time.ParseDuration(arg(args, 2, "0s"))
		if err != nil {
			return err
		}
		time.Sleep(after)
		fmt.Println("exiting with", code)
		os.Exit(code)
	case "hog":
		mib, err := strconv.Atoi(arg(args, 1, "64"))
		if err != nil {
			return err
		}
		debug.SetGCPercent(-1)
		b := make([]byte, mib<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("took", mib, "MiB")
		untilTerm()
		fmt.Println(b[0])
	case "pause":
		untilTerm()
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("ignoring SIGTERM")
		for {
			time.Sleep(time.Hour)
		}
	case "counted":
		if len(args) < 3 {
			return errors.New("counted: want a directory and a command")
		}
		unlock, err := count(args[1])
		if err != nil {
			return err
		}
		defer unlock()
		return run(args[2:])
	case "note":
		length, err := time.ParseDuration(arg(args, 3, "0s"))
		if err != nil {
			return err
		}
		return note(arg(args, 1, ""), arg(args, 2, ""), func() { time.Sleep(length) })
	case "noted":
		return note(arg(args, 1, ""), arg(args, 2, ""), untilTerm)
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
	case "write":
		if err := os.WriteFile(arg(args, 1, ""), []byte(arg(args, 2, "")), 0o644); err != nil {
			return err
		}
		untilTerm()
	default:
		return fmt.Errorf("unknown command %q", cmd)
	}
	return nil
}

// note adds a line to file, does what is between, and adds another.
func note(file, text string, between func()) error {
	if err := appendLine(file, text+" begins"); err != nil {
		return err
	}
	between()
	return appendLine(file, text+" ends")
}

func appendLine(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text + "\n") // one write a line: whole lines only
	return errors.Join(err, f.Close())
}

// count notes one start in dir: a line in a file named by $POD_UID. Whoever
// finds $POD_NAME's lock held runs beside another of its name, and says so in
// the file "double". The lock lives as long as this process.
func count(dir string) (unlock func() error, err error) {
	uid, name := os.Getenv("POD_UID"), os.Getenv("POD_NAME")
	if err := appendLine(filepath.Join(dir, "start."+uid), name+" "+os.Getenv("VERSION")+" "+time.Now().Format(time.RFC3339Nano)); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock."+name), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if err := appendLine(filepath.Join(dir, "double"), name+" "+uid+" "+os.Getenv("VERSION")); err != nil {
			return nil, err
		}
	}
	return lock.Close, nil
}

func serve(addr string) error {
	m := http.NewServeMux()
	text := func(path string, f func(r *http.Request) (string, error)) {
		m.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			s, err := f(r)
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			io.WriteString(w, s)
		})
	}
	text("/", func(*http.Request) (string, error) { return "testserver\n", nil })
	text("/healthz", func(*http.Request) (string, error) { return "ok", nil })
	text("/hostname", func(*http.Request) (string, error) { return os.Hostname() })
	text("/pid", func(*http.Request) (string, error) { return strconv.Itoa(os.Getpid()), nil })
	text("/env", func(*http.Request) (string, error) {
		b, err := json.Marshal(os.Environ())
		return string(b), err
	})
	text("/file", func(r *http.Request) (string, error) {
		b, err := os.ReadFile(r.FormValue("path"))
		return string(b), err
	})
	text("/write", func(r *http.Request) (string, error) {
		return "", os.WriteFile(r.FormValue("path"), []byte(r.FormValue("text")), 0o644)
	})
	client := http.Client{Timeout: 5 * time.Second}
	text("/get", func(r *http.Request) (string, error) {
		resp, err := client.Get(r.FormValue("url"))
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	})
	text("/exit", func(r *http.Request) (string, error) {
		code, err := strconv.Atoi(r.FormValue("code"))
		if err != nil {
			return "", err
		}
		go func() {
			time.Sleep(10 * time.Millisecond) // let the answer leave
			os.Exit(code)
		}()
		return "exiting", nil
	})
	m.HandleFunc("/reset", func(w http.ResponseWriter, _ *http.Request) {
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			_ = conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}
	})
	srv := &http.Server{Addr: addr, Handler: m, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- srv.ListenAndServe() }()
	fmt.Println("serving on", addr)
	term := make(chan struct{})
	go func() { untilTerm(); close(term) }()
	select {
	case err := <-ended:
		return err
	case <-term:
		return srv.Close()
	}
}
