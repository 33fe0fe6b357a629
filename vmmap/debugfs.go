// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// debugfs reads KVM's directory in debugfs: one directory "<tid>-<fd>" for each
// virtual machine, named after the thread that made it, and in this one
// "vcpu<N>" for each vCPU.
type debugfs struct{ kvm string }

// vms returns the names of the directories by the thread that made each. The
// error wraps fs.ErrNotExist where debugfs is not mounted or KVM not loaded.
func (d debugfs) vms() (map[int][]string, error) {
	entries, err := os.ReadDir(d.kvm)
	if err != nil {
		return nil, err
	}
	vms := make(map[int][]string)
	for _, e := range entries {
		maker, _, ok := strings.Cut(e.Name(), "-")
		if tid, err := strconv.Atoi(maker); ok && err == nil {
			vms[tid] = append(vms[tid], e.Name())
		}
	}
	return vms, nil
}

// vcpus returns the vCPUs of a process's virtual machines as a map from tid to
// KVM's number. Those that never ran have no thread yet.
func (d debugfs) vcpus(vms []string) map[int]int {
	var vcpus map[int]int
	for _, vm := range vms {
		// An error is that of a machine which stopped meanwhile.
		files, _ := filepath.Glob(filepath.Join(d.kvm, vm, "vcpu*", "pid"))
		for _, file := range files {
			n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(file)), "vcpu"))
			if err != nil {
				continue
			}
			b, err := os.ReadFile(file)
			if err != nil {
				continue
			}
			if tid, err := strconv.Atoi(string(bytes.TrimSpace(b))); err == nil && tid > 0 {
				if vcpus == nil {
					vcpus = make(map[int]int)
				}
				vcpus[tid] = n
			}
		}
	}
	return vcpus
}
