package server

import "github.com/coreos/go-systemd/v22/daemon"

// Run takes up what is there and serves; it returns after Shutdown.
func (s *Server) Run(h *handover) error {
	go s.loop.run(s.log)
	if err := s.recover(h.stored()); err != nil {
		return err
	}
	go s.reaper.run()
	if err := s.Listen(h.listener()); err != nil {
		return err
	}
	s.resumeExecs(h)
	// Type=notify: whoever waits for podd-shim.service finds it answering.
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		s.log.Warn("service manager not told", "error", err)
	}
	return s.Serve()
}
