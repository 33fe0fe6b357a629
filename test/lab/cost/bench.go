// SPDX-License-Identifier: Apache-2.0

package cost

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"virtexit/internal/snapshot"
	"virtexit/internal/source"
	"virtexit/internal/source/ebpf"
	"virtexit/internal/source/kmod"
)

// Row is what exits of one kind cost under one observer.
type Row struct {
	Kernel       string  `json:"kernel"`          // release
	Hook         string  `json:"hook"`            // which KVM is loaded: "tracepoint", the stock one; "patch", kvm-patch's
	Observer     string  `json:"observer"`        // who watches: Nothing, Virtexit, "perf stat", ...
	Level        string  `json:"level,omitempty"` // virtexit's; at "off" the module is loaded and there is no lease
	Exit         Exit    `json:"exit"`            // kind
	Instructions int     `json:"instructions"`    // Cost.Least
	Added        int     `json:"added"`           // to Instructions of Nothing on the stock KVM
	Mean         float64 `json:"mean"`            // Cost.Mean
	MeanAdded    float64 `json:"mean_added"`      // to Mean of Nothing on the stock KVM
	Exits        int     `json:"exits"`           // how many were taken
}

// Observers, besides those of other people. NothingAgain comes last on each KVM: how far it is from Nothing tells what the
// measure is worth.
const (
	Nothing      = "nothing"
	NothingAgain = "nothing, again"
	Virtexit     = "virtexit"
	VirtexitBPF  = "virtexit, eBPF"   // where no module may be loaded
	BPFClock     = "BPF, clock alone" // programs at exit and entry that read the clock: the kernel's own share in what those of others take
)

// observer watches exits from start to stop, which tells how many it has counted.
type observer struct {
	name, level string
	idle        bool // is there, but does not count
	start       func(tid int) (stop func() (counted int, err error), err error)
}

func none(name, level string) observer {
	stop := func() (int, error) { return 0, nil }
	return observer{name, level, true, func(int) (func() (int, error), error) { return stop, nil }}
}

// Bench measures virtexit.ko, and others where peers is set, on all kinds of exits, with the stock KVM and with kvm-patch's,
// which it loads. It runs in the root of the repository, where build/ holds the modules for this kernel.
func Bench(peers bool, emit func(Row)) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	b := bench{release: unix.ByteSliceToString(u.Release[:]), emit: emit, base: map[Exit]Cost{}}
	patched := filepath.Join("build/kvm-patch", b.release)
	for _, step := range []func() error{
		func() error { return command("modprobe", "kvm_amd") },
		func() error { return b.run("tracepoint", peers) },
		func() error { return command("modprobe", "-r", "kvm_amd", "kvm") },
		func() error { return command("modprobe", "-a", "irqbypass", "ccp") },
		func() error { return command("insmod", filepath.Join(patched, "kvm.ko")) },
		func() error { return command("insmod", filepath.Join(patched, "kvm-amd.ko")) },
		func() error { return b.run("patch", false) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

type bench struct {
	release string
	emit    func(Row)
	base    map[Exit]Cost // of Nothing on the stock KVM
}

// run measures what there is on the KVM that is loaded, which has this hook.
func (b *bench) run(hook string, peers bool) (err error) {
	m, err := NewMeter()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()

	if err := b.measure(m, hook, none(Nothing, "")); err != nil {
		return err
	}
	if err := b.virtexit(m, hook); err != nil {
		return err
	}
	if hook == "tracepoint" {
		if err := b.bpf(m, hook); err != nil {
			return err
		}
	}
	var others []observer
	if peers {
		others = allPeers()
	}
	for _, o := range append(others, none(NothingAgain, "")) {
		if err := b.measure(m, hook, o); err != nil {
			return err
		}
	}
	return nil
}

// virtexit measures virtexit.ko.
func (b *bench) virtexit(m *Meter, hook string) (err error) {
	if err := command("insmod", filepath.Join("build/kmod", b.release, "virtexit.ko")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unload("virtexit")) }()
	if err := b.measure(m, hook, none(Virtexit, snapshot.Off.String())); err != nil {
		return err
	}
	for _, l := range []snapshot.Level{snapshot.Pause, snapshot.Count, snapshot.Time, snapshot.Recent} {
		o := level(Virtexit, hook, l, func() (source.Source, error) { return kmod.Open() })
		if err := b.measure(m, hook, o); err != nil {
			return err
		}
	}
	return nil
}

// bpf measures the eBPF collector at the levels that it is used at, and the kernel's share in that.
func (b *bench) bpf(m *Meter, hook string) (err error) {
	if err := b.measure(m, hook, observer{name: BPFClock, idle: true, start: bpfClock}); err != nil {
		return err
	}
	c, err := ebpf.New(ebpf.Options{Slots: 64})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for _, l := range []snapshot.Level{snapshot.Count, snapshot.Time} {
		o := level(VirtexitBPF, hook, l, func() (source.Source, error) { return c.Open() })
		if err := b.measure(m, hook, o); err != nil {
			return err
		}
	}
	return nil
}

// measure has an observer watch exits of each kind. One that misses some has not done what is to be measured: an error.
func (b *bench) measure(m *Meter, hook string, o observer) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s %s, hook %s: %w", o.name, o.level, hook, err)
		}
	}()
	stop, err := o.start(m.TID())
	if err != nil {
		return err
	}
	taken := 0
	for _, kind := range Exits {
		c, err := m.Cost(kind)
		if err != nil {
			_, stopErr := stop()
			return errors.Join(err, stopErr)
		}
		taken += c.Exits
		if _, ok := b.base[kind]; !ok {
			b.base[kind] = c
		}
		b.emit(Row{
			Kernel: b.release, Hook: hook, Observer: o.name, Level: o.level, Exit: kind,
			Instructions: c.Least, Added: c.Least - b.base[kind].Least,
			Mean: c.Mean, MeanAdded: c.Mean - b.base[kind].Mean,
			Exits: c.Exits,
		})
	}
	counted, err := stop()
	if err != nil {
		return err
	}
	if o.idle && counted != 0 || !o.idle && counted < taken {
		return fmt.Errorf("counted %d exits of %d", counted, taken)
	}
	return nil
}

// level is a collector of virtexit's at a level.
func level(name, hook string, level snapshot.Level, open func() (source.Source, error)) observer {
	idle := level == snapshot.Pause
	start := func(tid int) (func() (int, error), error) {
		s, err := open()
		if err != nil {
			return nil, err
		}
		if err := s.SetLevel(level); err != nil {
			return nil, errors.Join(err, s.Close())
		}
		info, err := s.Info()
		if err == nil && !idle && info.Hook != hook {
			err = fmt.Errorf("the hook is %s %s", info.Hook, info.Refused)
		}
		before, countErr := exits(s, tid)
		if err := errors.Join(err, countErr); err != nil {
			return nil, errors.Join(err, s.Close())
		}
		return func() (int, error) {
			after, err := exits(s, tid)
			return after - before, errors.Join(err, s.Close())
		}, nil
	}
	return observer{name, level.String(), idle, start}
}

// exits of a thread.
func exits(s source.Source, tid int) (int, error) {
	snap, err := s.Snapshot()
	if err != nil {
		return 0, err
	}
	n := uint64(0)
	for i := range snap.Slots {
		if snap.Slots[i].TID == tid {
			n += snap.Slots[i].Exits()
		}
	}
	return int(n), nil
}

// unload removes a module. Who has closed its device may still be on the way out.
func unload(name string) error {
	var err error
	for range 50 {
		if err = unix.DeleteModule(name, unix.O_NONBLOCK); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("unload %s: %w", name, err)
	}
	return nil
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w: %s", name, args, err, out)
	}
	return nil
}
