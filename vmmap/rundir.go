// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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

// runDirs reads the run directories of libvirt's system daemon and of its
// session daemons. Libvirt replaces a file when something changes, so those
// that are the same as before are not read again.
type runDirs struct {
	run   string // where /run lies
	files map[string]statusFile
}

type statusFile struct {
	info   fs.FileInfo
	status *status
	err    error // why status is nil
}

// scan returns the guests by process id, and whether there is a directory. A
// file that cannot be read does not hide the others.
func (r *runDirs) scan() (guests map[int]*status, there bool, err error) {
	var paths []string
	for _, pattern := range []string{"libvirt/qemu", "user/*/libvirt/qemu/run"} {
		dirs, err := filepath.Glob(filepath.Join(r.run, pattern))
		if err != nil {
			return nil, false, err
		}
		for _, dir := range dirs {
			there = true
			found, err := filepath.Glob(filepath.Join(dir, "*.xml"))
			if err != nil {
				return nil, false, err
			}
			paths = append(paths, found...)
		}
	}
	files := make(map[string]statusFile, len(paths))
	guests = make(map[int]*status, len(paths))
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
		guests[f.status.pid] = f.status
	}
	r.files = files
	return guests, there, errors.Join(errs...)
}

// read returns what a file holds; the error is that of a file that is not there.
func (r *runDirs) read(path string) (statusFile, error) {
	info, err := os.Stat(path)
	if err != nil {
		return statusFile{err: err}, err
	}
	if f, ok := r.files[path]; ok && os.SameFile(f.info, info) && f.info.ModTime().Equal(info.ModTime()) {
		return f, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return statusFile{info: info, err: err}, err
	}
	s, err := parseStatus(b)
	return statusFile{info: info, status: s, err: err}, nil
}
