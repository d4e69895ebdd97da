package imagegc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
)

// Period between two looks (upstream's ImageGCPeriod).
const Period = 5 * time.Minute

// hurry is the least time between two looks that were asked for.
const hurry = 10 * time.Second

// Store of images.
type Store interface {
	// Images that there are.
	Images(ctx context.Context) ([]Image, error)
	// Remove an image. Its room is free after the next Sweep at the latest.
	Remove(ctx context.Context, id string) error
	// Sweep frees what belongs to no image, leftovers of pulls among it.
	Sweep(ctx context.Context) error
	// Disk is measured now.
	Disk() (Disk, error)
}

// Config of a Collector.
type Config struct {
	Policy Policy
	Store  Store
	// Event about the node.
	Event func(eventType, reason, message string)
	// Removed counts; reason is age or space.
	Removed func(reason string)
	Log     *slog.Logger
}

// Report of one look.
type Report struct {
	At      time.Time
	Before  Disk
	After   Disk
	Removed []string // names
	Freed   int64    // bytes, as measured; others may have written meanwhile
	Kept    Kept
	// Short: no more could be removed, and the disk is fuller than it should be.
	Short bool
}

// Collector removes images.
type Collector struct {
	cfg  Config
	kick chan struct{}
	full atomic.Bool // somebody has found no room since the last look

	history history
	began   time.Time
	failed  bool // last time

	mu   sync.Mutex
	last Report
}

// New returns a Collector; Run must be called for anything to happen.
func New(cfg Config) *Collector {
	return &Collector{cfg: cfg, kick: make(chan struct{}, 1), history: history{}}
}

// Policy that it follows.
func (c *Collector) Policy() Policy { return c.cfg.Policy }

// Last report; a zero At: there is none yet.
func (c *Collector) Last() Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// Hurry asks for a look soon: somebody found no room.
func (c *Collector) Hurry() {
	c.full.Store(true)
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// Run looks now and then until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	if c.cfg.Policy.Off() {
		<-ctx.Done()
		return nil
	}
	c.began = time.Now()
	tick := time.NewTicker(Period)
	defer tick.Stop()
	for {
		c.round(ctx, time.Now())
		rest := time.After(hurry)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-c.kick:
			select {
			case <-ctx.Done():
				return nil
			case <-rest:
			}
		}
	}
}

// round tells of what went wrong: the first time in the log, from the second in
// a row on by an event, too, as upstream does.
func (c *Collector) round(ctx context.Context, now time.Time) {
	report, err := c.Collect(ctx, now)
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	c.last = report
	c.mu.Unlock()
	if len(report.Removed) > 0 {
		c.cfg.Log.Info("images removed", "images", report.Removed, "freed", report.Freed, "used_percent", report.After.UsedPercent())
	}
	if err != nil {
		c.cfg.Log.Warn("images are not removed as they should be", "error", err)
		if c.failed {
			c.cfg.Event(v1.EventTypeWarning, "ImageGCFailed", err.Error())
		}
	}
	c.failed = err != nil
}

// Collect looks once. Its error says that the disk stays fuller than it should
// be, or what kept the look from happening.
func (c *Collector) Collect(ctx context.Context, now time.Time) (Report, error) {
	r := Report{At: now}
	full := c.full.Swap(false)
	images, err := c.cfg.Store.Images(ctx)
	if err != nil {
		return r, fmt.Errorf("list images: %w", err)
	}
	c.history.see(images, now)
	r.Kept = kept(images)
	if r.Before, err = c.disk(); err != nil {
		return r, err
	}
	r.After = r.Before
	left, err := c.old(ctx, c.history.candidates(images), now, &r)
	if err != nil {
		return r, err
	}
	if r.After, err = c.disk(); err != nil {
		return r, err
	}
	wanted := c.cfg.Policy.missing(r.After, full)
	if wanted > 0 {
		err = c.space(ctx, left, now, &r)
	} else {
		r.Kept.Young = c.young(left, now)
	}
	r.Freed = max(r.After.Available-r.Before.Available, 0)
	if err == nil && wanted > 0 && c.cfg.Policy.short(r.After) > 0 {
		r.Short = true
		message := insufficient(r)
		c.cfg.Event(v1.EventTypeWarning, "FreeDiskSpaceFailed", message)
		err = errors.New(message)
	}
	return r, err
}

// disk of the images; one without capacity is told of.
func (c *Collector) disk() (Disk, error) {
	d, err := c.cfg.Store.Disk()
	if err != nil {
		return d, fmt.Errorf("size of the image file system: %w", err)
	}
	if d.Capacity <= 0 {
		err := errors.New("invalid capacity 0 on image filesystem")
		c.cfg.Event(v1.EventTypeWarning, "InvalidDiskCapacity", err.Error())
		return d, err
	}
	return d, nil
}

// old removes what has not been used for too long and returns the others.
func (c *Collector) old(ctx context.Context, candidates []Image, now time.Time, r *Report) (left []Image, err error) {
	var errs []error
	for _, i := range candidates {
		if !c.cfg.Policy.expired(c.history[i.ID], now, c.began) {
			left = append(left, i)
			continue
		}
		if err := c.remove(ctx, i, "age", r); err != nil {
			errs = append(errs, err)
			r.Kept.Failed.add(i)
		}
	}
	if len(errs) > 0 {
		return left, fmt.Errorf("remove images that were not used for %s: %w", c.cfg.Policy.MaxAge, errors.Join(errs...))
	}
	return left, nil
}

// space removes images until there is room: first what no image needs.
func (c *Collector) space(ctx context.Context, candidates []Image, now time.Time, r *Report) error {
	p := c.cfg.Policy
	err := c.cfg.Store.Sweep(ctx)
	errs := []error{err}
	if r.After, err = c.disk(); err != nil {
		return err
	}
	r.Kept.Young = c.young(candidates, now)
	for _, i := range candidates {
		if p.short(r.After) <= 0 {
			break
		}
		if p.young(c.history[i.ID], now) {
			continue
		}
		if err := c.remove(ctx, i, "space", r); err != nil {
			errs = append(errs, err)
			r.Kept.Failed.add(i)
			continue
		}
		if err := c.cfg.Store.Sweep(ctx); err != nil {
			errs = append(errs, err)
		}
		if r.After, err = c.disk(); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

func (c *Collector) remove(ctx context.Context, i Image, reason string, r *Report) error {
	c.cfg.Log.Info("image is removed", "image", i.Name, "id", i.ID, "size", i.Size, "reason", reason)
	if err := c.cfg.Store.Remove(ctx, i.ID); err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	delete(c.history, i.ID)
	r.Removed = append(r.Removed, i.Name)
	c.cfg.Removed(reason)
	return nil
}

// kept are the images that nothing removes.
func kept(images []Image) (k Kept) {
	for _, i := range images {
		switch {
		case i.Used:
			k.Used.add(i)
		case i.Pinned:
			k.Pinned.add(i)
		}
	}
	return k
}

// young ones of those that could go.
func (c *Collector) young(candidates []Image, now time.Time) (s Sum) {
	for _, i := range candidates {
		if c.cfg.Policy.young(c.history[i.ID], now) {
			s.add(i)
		}
	}
	return s
}

// insufficient is upstream's message, and what stays.
func insufficient(r Report) string {
	text := fmt.Sprintf("Insufficient free disk space on the node's image filesystem (%d%% of %s used). "+
		"Failed to free sufficient space by deleting unused images (freed %d bytes). "+
		"Investigate disk usage, as it could be used by active images, logs, volumes, or other data.",
		r.Before.UsedPercent(), Size(r.Before.Capacity), r.Freed)
	if stay := r.Kept.String(); stay != "" {
		text += " Images that stay: " + stay + "."
	}
	return text
}

// String lists what stays, "" for nothing.
func (k Kept) String() string {
	var parts []string
	for _, p := range []struct {
		Sum
		why string
	}{{k.Used, "used by pods"}, {k.Pinned, "pinned"}, {k.Young, "too young (imageMinimumGCAge)"}, {k.Failed, "not to be removed"}} {
		if p.Images > 0 {
			parts = append(parts, fmt.Sprintf("%d %s, %s", p.Images, p.why, Size(p.Bytes)))
		}
	}
	return strings.Join(parts, "; ")
}

// Size in upstream's form: "1.5 GiB".
func Size(n int64) string {
	size, units := float64(n), []string{"KiB", "MiB", "GiB", "TiB"}
	if size < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	i := -1
	for ; size >= 1024 && i < len(units)-1; i++ {
		size /= 1024
	}
	return fmt.Sprintf("%.1f %s", size, units[i])
}
