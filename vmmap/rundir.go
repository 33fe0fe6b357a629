// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// status is what libvirt writes down about a guest that runs.
type status struct {
	pid   int
	id    *int
	name  string
	uuid  string
	state State       // empty when not known
	vcpus map[int]int // tid -> vCPU number
	Metadata

	session *int // the user in whose directory the file lies; nil when that is the host's
}

// tells tells whether the file may be about this process: the process bears the
// uuid, and what a user wrote is about that user's own processes.
func (s *status) tells(g *guest) bool {
	return s.uuid == g.args.uuid && (s.session == nil || *s.session == g.uid)
}

// states are libvirt's words for what virsh prints.
var states = map[string]State{
	"nostate":     Unknown,
	"running":     Running,
	"blocked":     Idle,
	"paused":      Paused,
	"shutdown":    Shutdown,
	"shutoff":     ShutOff,
	"crashed":     Crashed,
	"pmsuspended": Suspended,
}

// parseStatus reads the file NAME.xml of libvirt's run directory.
func parseStatus(b []byte) (*status, error) {
	var x struct {
		XMLName xml.Name `xml:"domstatus"`
		State   string   `xml:"state,attr"`
		PID     int      `xml:"pid,attr"`
		VCPUs   []struct {
			ID  int `xml:"id,attr"`
			TID int `xml:"pid,attr"`
		} `xml:"vcpus>vcpu"`
		Domain domainXML `xml:"domain"`
	}
	if err := xml.Unmarshal(b, &x); err != nil {
		return nil, fmt.Errorf("domain status: %w", err)
	}
	s := &status{
		pid:      x.PID,
		id:       x.Domain.ID,
		name:     x.Domain.Name,
		uuid:     parseUUID(x.Domain.UUID),
		state:    states[x.State],
		Metadata: x.Domain.metadata(),
	}
	switch {
	case s.pid <= 0:
		return nil, fmt.Errorf("domain status: pid %d", s.pid)
	case s.name == "":
		return nil, errors.New("domain status: no name")
	case s.uuid == "":
		return nil, fmt.Errorf("domain status: uuid %q", x.Domain.UUID)
	}
	for _, v := range x.VCPUs {
		if v.TID <= 0 {
			continue // without KVM, vCPUs may share a thread or have none
		}
		if s.vcpus == nil {
			s.vcpus = make(map[int]int, len(x.VCPUs))
		}
		s.vcpus[v.TID] = v.ID
	}
	return s, nil
}

// maxStatus is more than libvirt itself takes for the XML of a domain.
const maxStatus = 8 << 20

// runDirs reads the run directories of libvirt's system daemon and of its
// session daemons; these belong to users, who may put anything there. Libvirt
// replaces a file when something changes, so those that are the same as before
// are not read again.
type runDirs struct {
	run   string // where /run lies
	files map[string]statusFile
}

type statusFile struct {
	info   fs.FileInfo
	status *status
	err    error // why status is nil
}

// scan returns what the files tell by process id, the host's first, and whether
// the host has a directory. A file that cannot be read does not hide the others.
func (r *runDirs) scan() (guests map[int][]*status, there bool, err error) {
	var paths []string
	const host = "libvirt/qemu"
	for _, pattern := range []string{host, "user/*/libvirt/qemu/run"} {
		dirs, err := filepath.Glob(filepath.Join(r.run, pattern))
		if err != nil {
			return nil, false, err
		}
		for _, dir := range dirs {
			there = there || pattern == host
			found, err := filepath.Glob(filepath.Join(dir, "*.xml"))
			if err != nil {
				return nil, false, err
			}
			paths = append(paths, found...)
		}
	}
	files := make(map[string]statusFile, len(paths))
	guests = make(map[int][]*status, len(paths))
	var errs []error
	for _, path := range paths {
		f, err := r.read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the guest stopped meanwhile
		}
		files[path] = f
		if f.err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, f.err))
			continue
		}
		guests[f.status.pid] = append(guests[f.status.pid], f.status)
	}
	r.files = files
	return guests, there, errors.Join(errs...)
}

// session tells whose session a file is of.
func (r *runDirs) session(path string) *int {
	below, ok := strings.CutPrefix(path, filepath.Join(r.run, "user")+"/")
	if !ok {
		return nil
	}
	user, _, _ := strings.Cut(below, "/")
	uid, err := strconv.Atoi(user)
	if err != nil {
		uid = -1 // nobody's
	}
	return &uid
}

// read returns what a file holds; the error is that of a file that is not
// there. It waits for nobody, whatever was put there instead of a file.
func (r *runDirs) read(path string) (statusFile, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return statusFile{err: err}, err
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return statusFile{err: err}, err
	case !info.Mode().IsRegular():
		return statusFile{err: errors.New("not a regular file")}, nil
	}
	if f, ok := r.files[path]; ok && f.info != nil && os.SameFile(f.info, info) && f.info.ModTime().Equal(info.ModTime()) {
		return f, nil
	}
	b, err := io.ReadAll(io.LimitReader(file, maxStatus))
	if err != nil {
		return statusFile{err: err}, err
	}
	s, err := parseStatus(b)
	if err == nil {
		if s.session = r.session(path); s.session != nil {
			s.id = nil // each session counts its own
		}
	}
	return statusFile{info: info, status: s, err: err}, nil
}
