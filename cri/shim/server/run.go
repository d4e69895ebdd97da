package server

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Run takes up what is there and serves; it returns after Shutdown.
func (s *Server) Run(h *handover) error {
	// Before anything can reap: an exec may have ended during the upgrade, and its
	// exit code is with whoever waits for it first.
	release := s.reaper.expect(h.execs())
	go s.loop.run(s.log)
	enough := s.extendStart()
	err := s.recover(h.stored())
	enough()
	if err != nil {
		return err
	}
	go s.reaper.run()
	if err := s.Listen(h.listener()); err != nil {
		return err
	}
	s.resumeExecs(h)
	release()
	// Type=notify: whoever waits for podd-shim.service finds it answering.
	s.notify(daemon.SdNotifyReady)
	return s.Serve()
}

// extension is asked of the service manager while containers are taken up: to
// be ended for being slow would only begin it anew.
const extension = time.Minute

// extendStart asks for more time until the function returned is called.
func (s *Server) extendStart() (enough func()) {
	stop := make(chan struct{})
	go func() {
		tick := time.NewTicker(extension / 3)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", extension.Microseconds()))
			case <-stop:
				return
			}
		}
	}()
	return func() { close(stop) }
}

func (s *Server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("service manager not told", "state", state, "error", err)
	}
}
