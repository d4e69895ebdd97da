package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newMan writes the manual pages of all commands; for those who make packages.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write manual pages",
		Args:   cobra.ExactArgs(1),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			date, err := sourceDate()
			if err != nil {
				return err
			}
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			run, _, err := root.Find([]string{"run"})
			if err != nil {
				return err
			}
			run.Hidden = true // its page is podd-run(8), made of the daemon's flags
			unhome(root)
			return doc.GenManTree(root, &doc.GenManHeader{Title: "PODD", Section: "1", Source: "podd", Manual: "User Commands", Date: &date}, args[0])
		},
	}
}

// sourceDate is the date of the pages: equal sources give equal pages
// (reproducible-builds.org, SOURCE_DATE_EPOCH).
func sourceDate() (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return time.Now(), nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(n, 0).UTC(), nil
}

// unhome takes the builder's home directory and the generator's name out of the
// texts.
func unhome(cmd *cobra.Command) {
	cmd.DisableAutoGenTag = true
	home, err := os.UserHomeDir()
	if err == nil && home != "/" {
		for _, text := range []*string{&cmd.Long, &cmd.Example} {
			*text = strings.ReplaceAll(*text, home, "$HOME")
		}
	}
	for _, sub := range cmd.Commands() {
		unhome(sub)
	}
}
