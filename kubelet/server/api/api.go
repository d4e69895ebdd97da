// Package api is the vocabulary of podd's own part of the local API, below
// /podd/v1 on the daemon's socket. Everything else there is the Kubernetes API.
package api

import "time"

// SocketName is the local API's socket in the run directory.
const SocketName = "api.sock"

// Prefix of podd's own resources.
const Prefix = "/podd/v1"

// Version tells what runs.
type Version struct {
	// Version is the release or commit, Go the toolchain.
	Version string `json:"version"`
	Go      string `json:"go,omitempty"`
	PID     int    `json:"pid,omitempty"`
}

// Versions answers GET /podd/v1/version.
type Versions struct {
	Daemon Version  `json:"daemon"`
	Shim   *Version `json:"shim,omitempty"` // absent: podd-shim does not answer
}

// Status answers GET /podd/v1/status.
type Status struct {
	Versions
	NodeName  string    `json:"nodeName"`
	StartedAt time.Time `json:"startedAt"`
	// ShimProblem is why podd-shim does not answer, in words.
	ShimProblem string `json:"shimProblem,omitempty"`
	// Cluster that the node is in; absent: none.
	Cluster *Cluster `json:"cluster,omitempty"`
	// Pods by phase, and those of each that are not as they should be, by why.
	Pods     map[string]int            `json:"pods"`
	Troubled map[string]map[string]int `json:"troubledPods,omitempty"`
	Pulls    []Progress                `json:"pulls,omitempty"`
	// Problems counts the manifests that are not in force.
	Problems int `json:"problems"`
	// Disk that holds the images; absent: it could not be measured.
	Disk *Disk `json:"disk,omitempty"`
	// Goroutines of the daemon, for those who look for leaks.
	Goroutines int `json:"goroutines"`
}

// Cluster is the node's connection with its apiserver.
type Cluster struct {
	Server string `json:"server"`
	// State is Connected, or Connecting, Refused, Untrusted or Away.
	State string     `json:"state"`
	Since *time.Time `json:"since,omitempty"`
	// Message says why it is not connected.
	Message string `json:"message,omitempty"`
}

// Disk is the file system that holds the images.
type Disk struct {
	Path string `json:"path"`
	// Capacity and Available in bytes.
	Capacity    int64 `json:"capacity"`
	Available   int64 `json:"available"`
	UsedPercent int   `json:"usedPercent"`
	// High and Low are the thresholds, in percent, between which images that
	// nobody uses are removed; 100: never.
	High int `json:"imageGCHighThresholdPercent"`
	Low  int `json:"imageGCLowThresholdPercent"`
	// Short: fuller than High, and no image is left that could be removed.
	Short bool `json:"short,omitempty"`
	// Kept says which images stay, and why; with Short.
	Kept string `json:"kept,omitempty"`
	// Holders of what is used, the largest first; of a disk fuller than High.
	Holders []Holder `json:"holders,omitempty"`
}

// Holder of bytes on a disk.
type Holder struct {
	What  string `json:"what"` // "images", "pod default/web", …
	Bytes int64  `json:"bytes"`
}

// Problem is a manifest, or a part of one, that is not in force; or, with
// Warning, what is questionable about one that is.
type Problem struct {
	File     string    `json:"file"`
	Document int       `json:"document,omitempty"` // from 1; 0: the whole file
	Line     int       `json:"line,omitempty"`     // from 1; 0: not known
	Field    string    `json:"field,omitempty"`
	Message  string    `json:"message"`
	Remedy   string    `json:"remedy,omitempty"`
	Object   string    `json:"object,omitempty"`  // "Pod default/web", where it or another file or version has it in force
	Kept     bool      `json:"kept,omitempty"`    // the last good version stays in force
	Warning  bool      `json:"warning,omitempty"` // it is in force all the same
	Since    time.Time `json:"since"`
}

// Problems answers GET /podd/v1/problems.
type Problems struct {
	Items []Problem `json:"items"`
}

// Image of the node's store.
type Image struct {
	ID      string   `json:"id"`
	Tags    []string `json:"tags,omitempty"`
	Digests []string `json:"digests,omitempty"`
	Size    int64    `json:"size"` // bytes
	Pinned  bool     `json:"pinned,omitempty"`
}

// Images answers GET /podd/v1/images, and PUT with what was loaded.
type Images struct {
	Items []Image `json:"items"`
	// Failed are images of an archive that were not loaded, by name, while
	// others were.
	Failed []ImageProblem `json:"failed,omitempty"`
}

// ImageProblem is something that is not as it was stored.
type ImageProblem struct {
	ID      string   `json:"id,omitempty"` // of the image
	Names   []string `json:"names,omitempty"`
	Message string   `json:"message"`
}

// ImageProblems answers POST /podd/v1/images/verify.
type ImageProblems struct {
	Items []ImageProblem `json:"items"`
}

// Pull is the body of POST /podd/v1/images.
type Pull struct {
	Ref string `json:"ref"`
	// Username and Password for the registry; empty: what the daemon knows.
	Username string `json:"username,omitempty"`
	Password string `json:"password,omitempty"`
}

// Progress is one line of the answer to a pull: JSON lines, the last one with
// Image or Error.
type Progress struct {
	Ref        string `json:"ref"`
	Stage      string `json:"stage,omitempty"` // resolving, downloading, unpacking, done
	Layers     int    `json:"layers,omitempty"`
	LayersDone int    `json:"layersDone,omitempty"`
	Bytes      int64  `json:"bytes,omitempty"`
	Total      int64  `json:"total,omitempty"`
	Image      *Image `json:"image,omitempty"`
	Error      string `json:"error,omitempty"`
}
