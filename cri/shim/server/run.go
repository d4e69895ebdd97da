package server

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
	return s.Serve()
}
