// SPDX-License-Identifier: Apache-2.0

// Package vmmap tells which guest a process is: it maps the process that runs
// vCPU threads to the domain that libvirt, libvirt's run directory, KVM's
// debugfs or /proc know it as.
//
// Its sources, most trusted first:
//
//	libvirt   what a libvirt daemon lists, over a read-only connection
//	rundir    the files that libvirt keeps while a guest runs
//	proc      the arguments that a process was started with
//	process   the process itself: its name and its id
//
// libvirt tells no process id, so what it lists is joined to a process by the
// uuid, name and id that the run directory states, or by the uuid and name in
// the arguments where there is no run directory. Arguments are parsed, never
// searched. Only libvirt can be slow or hang, and it is called by [Libvirt.Run]
// alone: nothing else here waits for it.
package vmmap

import (
	"maps"
	"time"
)

// Domain is a guest. A guest that libvirt does not know is a domain too, named
// by its process's arguments or after its process.
type Domain struct {
	ID     *int        // libvirt's id; nil when the host's libvirt does not run it
	Name   string      // libvirt's name, or that in the arguments, or "<comm>-<tgid>"
	UUID   string      // lower case with dashes; empty when unknown
	TGID   int         // 0 when not running
	Start  uint64      // of the process: nanoseconds of CLOCK_BOOTTIME, in /proc's precision (10 ms); 0 when not running
	State  State       // [ShutOff] once the process has died
	Source string      // what named it: "libvirt", "rundir", "proc", "process"
	VCPUs  map[int]int // tid -> vCPU number: libvirt's from the run directory, else KVM's from debugfs; nil when neither knows
	Ended  map[int]int // the same of threads that ended before the process: their vCPUs were unplugged, whether or not they came back
	UID    *int        // of the user that runs the process; nil when unknown
	Seen   time.Time   // when this was last known to be true

	Container *Container // nil when the process lives on the host itself

	Metadata // libvirt's or the run directory's
}

// VCPU returns the number of the vCPU that a thread runs or ran, if it is known.
func (d *Domain) VCPU(tid int) (number int, known bool) {
	if number, known = d.VCPUs[tid]; !known {
		number, known = d.Ended[tid]
	}
	return number, known
}

// ended returns the threads that have ended: those before, and of the last ones
// those that are not among those of now.
func ended(before, last, now map[int]int) map[int]int {
	all := make(map[int]int)
	maps.Copy(all, before)
	maps.Copy(all, last)
	maps.DeleteFunc(all, func(tid, _ int) bool { _, alive := now[tid]; return alive })
	if len(all) == 0 {
		return nil
	}
	return all
}

// State is a domain's state in libvirt's words.
type State string

// The states that virsh prints.
const (
	Running   State = "running"
	Idle      State = "idle"
	Paused    State = "paused"
	Shutdown  State = "in shutdown"
	ShutOff   State = "shut off"
	Crashed   State = "crashed"
	Suspended State = "pmsuspended"
	Unknown   State = "no state"
)
