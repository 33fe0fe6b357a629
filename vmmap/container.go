// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// Container tells of the container that a guest's process lives in.
type Container struct {
	ID  string // the runtime's, 64 hexadecimal digits; empty when unknown
	Pod string // the uid that Kubernetes gave the pod; empty when it is none
	PID int    // of the process in its own pid namespace
}

// parseCgroup reads the ids of the container and of the pod from
// /proc/<pid>/cgroup. Runtimes agree that a container's is the last word of a
// directory, Kubernetes says "pod<uid>"; systemd has its own way with dashes.
// Of containers in containers, the innermost counts.
func parseCgroup(b []byte) (id, pod string) {
	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3) // number, controllers, path
		if len(fields) != 3 {
			continue
		}
		kubernetes := false
		for word := range strings.FieldsFuncSeq(fields[2], func(r rune) bool { return r == '/' || r == ':' }) {
			word = strings.TrimSuffix(strings.TrimSuffix(word, ".slice"), ".scope")
			kubernetes = kubernetes || strings.Contains(word, "kubepods")
			if uid := podUID(word); kubernetes && uid != "" {
				pod = uid
			}
			if last := word[strings.LastIndexByte(word, '-')+1:]; len(last) == 64 && isHex(last) {
				id = last
			}
		}
	}
	return id, pod
}

// podUID returns the uid at the end of "pod<uid>" or "kubepods-burstable-pod<uid>":
// a uuid, or 32 digits without dashes for a pod that the host's own files define.
func podUID(word string) string {
	i := strings.LastIndex(word, "pod")
	if i < 0 {
		return ""
	}
	uid := strings.ReplaceAll(word[i+len("pod"):], "_", "-")
	if parseUUID(uid) != uid && (len(uid) != 32 || !isHex(uid)) {
		return ""
	}
	return uid
}

func isHex(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil
}

// container tells which container a process lives in; nil when in none that
// its cgroup or a pid namespace of its own would tell of.
func (p proc) container(pid int) (*Container, error) {
	cgroup, err := os.ReadFile(p.path(pid, "cgroup"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel may have no cgroups
		return nil, gone(err)
	}
	status, err := os.ReadFile(p.path(pid, "status"))
	if err != nil {
		return nil, gone(err)
	}
	c := &Container{PID: pid}
	c.ID, c.Pod = parseCgroup(cgroup)
	// One id for each namespace, from ours inwards.
	pids := strings.Fields(field(status, "NSpid"))
	if c.ID == "" && c.Pod == "" && len(pids) < 2 {
		return nil, nil
	}
	if len(pids) > 0 {
		if c.PID, err = strconv.Atoi(pids[len(pids)-1]); err != nil {
			return nil, err
		}
	}
	return c, nil
}
