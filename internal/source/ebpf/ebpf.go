// SPDX-License-Identifier: Apache-2.0

// Package ebpf gets exit counts from BPF programs on the tracepoints of KVM,
// where the kernel module can't be loaded. What the programs count is laid out
// as the module's counters are; this package does what besides the module does:
// leases, levels, retired slots and events.
package ebpf

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"

	"virtexit/internal/abi"
	"virtexit/internal/exitreason"
	"virtexit/internal/slots"
	"virtexit/internal/snapshot"
	"virtexit/internal/source"
)

const (
	chunkSlots = 64  // VX_CHUNK
	pool       = 128 // free slots that are kept ready for new vCPU threads
	// tick is how often KVM is looked for and the clocks are compared.
	tick = time.Second
	// again is after how long what the kernel refused is tried once more.
	again = 30 * time.Second
)

// Options of a Collector.
type Options struct {
	Version string // that Info tells
	Slots   int    // vCPU threads that can be counted at a time; 0: 8192
}

// Collector holds the programs and what they count. Its sources share it, as
// those of the kernel module share the module; with the process it ends.
type Collector struct {
	options Options
	clock   slots.Clock
	done    chan struct{}
	workers sync.WaitGroup

	// mu guards all below, and what of the slots is not the programs' alone.
	mu       sync.Mutex
	closed   bool
	spec     *ebpf.CollectionSpec
	maps     map[string]*ebpf.Map
	chunks   []*ebpf.Map
	recent   map[int]*ebpf.Map // by chunk
	region   *region
	memory   *slots.Memory
	events   *ringbuf.Reader
	sources  map[*Source]*lease
	programs *ebpf.Collection // of the KVM that is loaded
	of       loading          // what KVM that is
	kvm      *kvm
	failed   error     // why the kernel refused what was wished for; nil: it did not, or it may be tried again
	since    time.Time // when failed came about
	links    map[string]link.Link
	attached snapshot.Level // with no higher than Time
	missed   uint64         // exits at which the kernel ran no program, of all programs up to now
	lost     uint64         // events of the present programs that found no room
	relation relation
	now      state
	told     state // to the sources
}

// state is what a change of is an event.
type state struct {
	level   snapshot.Level // in force
	isa     exitreason.ISA
	kvm     bool
	refused string
}

// lease is what a source wishes for.
type lease struct {
	level  snapshot.Level // Off: nothing
	wishes map[snapshot.Process]snapshot.Level
}

// New makes a collector that counts nothing yet. The error is
// source.ErrUnavailable where the kernel or the process's capabilities do not
// allow it, and says what is missing.
func New(o Options) (*Collector, error) {
	if o.Slots == 0 {
		o.Slots = 8192
	}
	c := &Collector{
		options: o,
		clock:   slots.Monotonic(),
		done:    make(chan struct{}),
		maps:    make(map[string]*ebpf.Map),
		recent:  make(map[int]*ebpf.Map),
		sources: make(map[*Source]*lease),
		links:   make(map[string]link.Link),
	}
	if err := c.open(); err != nil {
		c.release()
		return nil, fmt.Errorf("open eBPF collector: %w", err)
	}
	c.workers.Go(c.listen)
	c.workers.Go(c.watch)
	return c, nil
}

func (c *Collector) open() error {
	if err := able("/"); err != nil {
		return err
	}
	if err := refused(probe()); err != nil {
		return err
	}
	var err error
	if c.spec, err = loadCollector(); err != nil {
		return err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return err
	}
	n := uint32(c.options.Slots+chunkSlots-1) / chunkSlots * chunkSlots
	for name, entries := range map[string]uint32{
		collectorMapChunks:    n / chunkSlots,
		collectorMapRecent:    n / chunkSlots,
		collectorMapCpus:      uint32(cpus),
		collectorMapFreeSlots: n,
		collectorMapThreads:   n,
		collectorMapEvents:    c.spec.Maps[collectorMapEvents].MaxEntries,
	} {
		c.spec.Maps[name].MaxEntries = entries
		if c.maps[name], err = ebpf.NewMap(c.spec.Maps[name]); err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
	}
	if c.region, err = newRegion(cpus, int(n)); err != nil {
		return err
	}
	h := c.region.header
	h.Loaded = c.clock.Boot()
	if err := c.region.place(c.maps[collectorMapCpus], int(h.CPUOffset), int(h.SlotOffset-h.CPUOffset)); err != nil {
		return err
	}
	if c.memory, err = slots.New(c.region.bytes, c.clock); err != nil {
		return err
	}
	c.events, err = ringbuf.NewReader(c.maps[collectorMapEvents])
	return err
}

// Close ends collection and all sources.
func (c *Collector) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	for s := range c.sources {
		c.leave(s)
	}
	c.closed = true
	close(c.done)
	err := c.release()
	c.mu.Unlock()
	c.workers.Wait()
	return err
}

// release gives back what open got, which may be a part.
func (c *Collector) release() error {
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.Close())
	}
	if c.programs != nil {
		c.programs.Close()
	}
	if c.events != nil {
		errs = append(errs, c.events.Close())
	}
	if c.region != nil {
		errs = append(errs, c.region.close())
	}
	for _, m := range c.chunks {
		errs = append(errs, m.Close())
	}
	for _, m := range c.recent {
		errs = append(errs, m.Close())
	}
	for _, m := range c.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// Open returns a source.
func (c *Collector) Open() (*Source, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, os.ErrClosed
	}
	s := &Source{collector: c, events: make(chan source.Event, 64)}
	c.sources[s] = &lease{}
	return s, nil
}

// leave ends a source and what it wishes for.
func (c *Collector) leave(s *Source) {
	if _, ok := c.sources[s]; !ok {
		return
	}
	delete(c.sources, s)
	close(s.events)
	c.update()
}

// level is the highest that is wished for, for whatever.
func (c *Collector) level() snapshot.Level {
	level := c.ownLevel()
	for _, l := range c.sources {
		for _, wish := range l.wishes {
			level = max(level, wish)
		}
	}
	return level
}

// ownLevel is that of the threads that no wish is for.
func (c *Collector) ownLevel() snapshot.Level {
	level := snapshot.Off
	for _, l := range c.sources {
		level = max(level, l.level)
	}
	return level
}

// processLevel is that of the threads of a process.
func (c *Collector) processLevel(p snapshot.Process) snapshot.Level {
	level := snapshot.Off
	for _, l := range c.sources {
		if wish, ok := l.wishes[p]; ok {
			level = max(level, wish)
		} else {
			level = max(level, l.level)
		}
	}
	return level
}

// update attaches what is wished for and KVM allows.
func (c *Collector) update() {
	found, vendor := findKVM("/")
	if found != c.of {
		// Nothing is missed where a vendor's module that was loaded anew is the same.
		if c.programs != nil && found.kvm == c.of.kvm && c.kvm.raw != nil && bytes.Equal(rawTypes(vendor), c.kvm.raw) {
			c.of = found
		} else {
			c.forget()
		}
	}
	c.now.kvm = found.kvm != 0
	want := snapshot.Off
	if c.now.kvm {
		want = c.level()
	}
	if time.Since(c.since) >= again {
		c.failed = nil
	}
	if want != snapshot.Off && c.programs == nil && c.failed == nil {
		c.fail(c.load(found, vendor))
	}
	if c.failed != nil {
		want = min(want, c.attached)
	}
	c.refill()
	c.fail(c.setLevel(want))
	c.now.refused = ""
	if c.failed != nil {
		c.now.refused = c.failed.Error()
	}
	c.wish()
	c.log()
	if c.now != c.told {
		c.told = c.now
		c.tell(source.Event{Kind: source.KVMChanged})
	}
}

// fail notes why the kernel refuses what is wished for. To ask again takes the
// kernel long, and the answer is not soon another.
func (c *Collector) fail(err error) {
	if err != nil {
		c.failed, c.since = err, time.Now()
	}
}

// forget gives up the programs: KVM is not the one that they are for.
func (c *Collector) forget() {
	c.setLevel(snapshot.Off)
	if c.programs != nil {
		c.missed, c.lost = c.misses(), 0
		c.programs.Close()
	}
	c.programs, c.kvm, c.of = nil, nil, loading{}
	c.now.isa, c.failed = exitreason.None, nil
}

// load makes the programs for the KVM that is loaded.
func (c *Collector) load(found loading, vendor int) error {
	c.of = found
	cache := btf.NewCache()
	k, err := describeKVM(vendor, cache)
	if err != nil {
		return err
	}
	if k.exit == collectorProgKvmExitAny {
		if err := tryRecord("kvm_exit"); err != nil {
			return fmt.Errorf("exits of an unknown vendor module: event kvm_exit: %w", err)
		}
	}
	spec := c.spec.Copy()
	given := uint32(0)
	if k.given {
		given = 1
	}
	for _, name := range []string{collectorProgKvmExit, collectorProgKvmExitGiven, collectorProgKvmExitAny, collectorProgKvmExitArm64,
		collectorProgKvmEntry, collectorProgKvmEntryArm64} {
		if name != k.exit && name != k.entry {
			delete(spec.Programs, name)
		}
	}
	direct, err := canCast(cache)
	if err != nil {
		return err
	}
	if err := errors.Join(
		spec.Variables[collectorVarVxIsa].Set(uint32(k.isa)),
		spec.Variables[collectorVarVxGiven].Set(given),
		spec.Variables[collectorVarVxDirect].Set(direct),
	); err != nil {
		return err
	}
	programs, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs:        ebpf.ProgramOptions{ExtraRelocationTargets: k.types},
		MapReplacements: c.maps,
		Cache:           cache,
	})
	if err != nil {
		return fmt.Errorf("the kernel refuses the programs%s: %w", near(err), err)
	}
	programs.Programs[collectorProgKvmExit] = programs.Programs[k.exit]
	programs.Programs[collectorProgKvmEntry] = programs.Programs[k.entry]
	k.types = nil
	c.programs, c.kvm = programs, k
	c.now.isa = k.isa
	return nil
}

// set sets a variable of the programs.
func (c *Collector) set(name string, value any) error {
	return c.programs.Variables[name].Set(value)
}

func (c *Collector) get(name string) (n uint32) {
	if c.programs != nil {
		c.programs.Variables[name].Get(&n) // it is of this size, or the tests would not pass
	}
	return n
}

// misses counts exits at which the kernel did not run the program, since it was
// interrupted at another on the same CPU.
func (c *Collector) misses() uint64 {
	if c.programs == nil {
		return c.missed
	}
	stats, err := c.programs.Programs[collectorProgKvmExit].Stats()
	if err != nil {
		return c.missed // before 5.12
	}
	return c.missed + stats.RecursionMisses
}

// tellLost tells that programs found no room for events.
func (c *Collector) tellLost() {
	if c.programs == nil {
		return
	}
	var n uint64
	if err := c.programs.Variables[collectorVarVxEventsLost].Get(&n); err == nil && n != c.lost {
		c.lost = n
		c.tell(source.Event{Kind: source.Lost})
	}
}

// attach puts programs on their events.
func (c *Collector) attach(names ...string) error {
	for _, name := range names {
		event := name
		switch name {
		case collectorProgThreadExit:
			event = "sched_process_exit"
		case collectorProgThreadExec:
			event = "sched_process_exec"
		}
		var l link.Link
		var err error
		if p := c.programs.Programs[name]; p.Type() == ebpf.TracePoint {
			l, err = attachRecord(event, p)
		} else {
			l, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: event, Program: p})
		}
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("the kernel has no event %s: %w", event, err)
		} else if err != nil {
			return fmt.Errorf("attach to the event %s: %w", event, err)
		}
		c.links[name] = l
	}
	return nil
}

// attachRecord puts a program on an event of KVM's, to have its record. The way
// there is through perf.
func attachRecord(event string, p *ebpf.Program) (link.Link, error) {
	l, err := link.Tracepoint("kvm", event, p, nil)
	return l, forbidden(err)
}

// tryRecord tells why there is no getting at the record of an event.
func tryRecord(event string) error {
	nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.TracePoint, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return err
	}
	defer nothing.Close()
	l, err := attachRecord(event, nothing)
	if err != nil {
		return err
	}
	return l.Close()
}

// detach takes programs off their events. They may still be running.
func (c *Collector) detach(names ...string) {
	for _, name := range names {
		if l, ok := c.links[name]; ok {
			l.Close()
			delete(c.links, name)
		}
	}
}

// settled returns when no program runs that was detached, or did before a
// variable changed: so the kernel promises of a change to a map of maps, be it
// to what was there. Without slots there is nothing that one could be at.
func (c *Collector) settled() error {
	if len(c.chunks) == 0 {
		return nil
	}
	return c.maps[collectorMapChunks].Put(uint32(0), c.chunks[0])
}

// steps lead to a level from the one below, and back.
func (c *Collector) steps(level snapshot.Level) (on func() error, off func() error) {
	switch level {
	case snapshot.Pause:
		programs := []string{collectorProgThreadExit, collectorProgThreadExec}
		return func() error {
				return c.attach(programs...)
			}, func() error {
				now := c.clock.Ticks()
				err := c.cap(snapshot.Off, now)
				c.detach(programs...)
				return errors.Join(err, c.settled())
			}
	case snapshot.Count:
		programs := []string{collectorProgKvmUserspaceExit, collectorProgKvmExit}
		return func() error {
				return c.attach(programs...)
			}, func() error {
				now := c.clock.Ticks()
				c.counting(false)
				c.lower(snapshot.Pause)
				c.detach(programs...)
				return errors.Join(c.settled(), c.cap(snapshot.Pause, now))
			}
	default:
		programs := []string{collectorProgKvmVcpuWakeup, collectorProgKvmEntry}
		return func() error {
				if err := c.relate(); err != nil {
					return err
				}
				if err := c.attach(programs...); err != nil {
					return err
				}
				return c.set(collectorVarVxTimed, uint32(1))
			}, func() error {
				now := c.clock.Ticks()
				err := c.set(collectorVarVxTimed, uint32(0))
				c.lower(snapshot.Count)
				c.detach(programs...)
				return errors.Join(err, c.settled(), c.cap(snapshot.Count, now))
			}
	}
}

func (c *Collector) setLevel(want snapshot.Level) error {
	level := min(want, snapshot.Time)
	var failed error
	for failed == nil && c.attached < level {
		on, off := c.steps(c.attached + 1)
		if failed = on(); failed == nil {
			c.attached++
		} else {
			off() // a part may be attached
		}
	}
	for c.attached > level {
		_, off := c.steps(c.attached)
		if err := off(); err != nil && failed == nil {
			failed = err
		}
		c.attached--
	}
	c.now.level = want
	if failed != nil {
		c.now.level = c.attached
	}
	c.counting(c.attached >= snapshot.Count)
	return failed
}

// live calls f for each slot that is in use by a thread.
func (c *Collector) live(f func(i int, p *abi.Slot)) {
	for i := range c.backed() {
		if p := &c.region.slots[i]; atomic.LoadUint32(&p.State) == abi.Live {
			f(i, p)
		}
	}
}

func (c *Collector) backed() int { return int(c.region.header.SlotsBacked) }

// lower has no slot rise above a level any more.
func (c *Collector) lower(level snapshot.Level) {
	c.set(collectorVarVxTakeLevel, uint32(level))
	c.live(func(i int, _ *abi.Slot) {
		if own := c.region.own(i); own.Want > uint32(level) {
			atomic.StoreUint32(&own.Want, uint32(level))
			atomic.StoreUint32(&own.Look, 1)
		}
	})
}

// cap has every slot fall to a level, or retire. No program is attached that a
// higher one needs.
func (c *Collector) cap(level snapshot.Level, now uint64) error {
	var errs []error
	settle := c.programs.Programs[collectorProgSettle]
	c.live(func(i int, _ *abi.Slot) {
		_, err := settle.Run(&ebpf.RunOptions{Context: [3]uint64{uint64(i), uint64(level), now}})
		errs = append(errs, err)
	})
	return errors.Join(errs...)
}

// wish has each slot adopt the level that is wished for.
func (c *Collector) wish() {
	if c.programs == nil {
		return
	}
	within := func(l snapshot.Level) uint32 { return uint32(max(min(l, c.now.level), snapshot.Pause)) }
	c.set(collectorVarVxTakeLevel, within(c.ownLevel()))
	c.live(func(i int, p *abi.Slot) {
		want := within(c.processLevel(snapshot.Process{TGID: int(p.TGID), Start: p.TGIDStartTime}))
		if own := c.region.own(i); own.Want != want {
			atomic.StoreUint32(&own.Want, want)
			atomic.StoreUint32(&own.Look, 1)
		}
		if c.now.level >= snapshot.Count {
			atomic.StoreUint32(&p.Level, want)
		}
	})
}

// log gives memory to the slots that log exits. Those that get none stay at Time.
func (c *Collector) log() {
	if c.now.level < snapshot.Recent {
		return
	}
	c.live(func(i int, p *abi.Slot) {
		own := c.region.own(i)
		if own.Want != abi.LevelRecent || p.HasRecent != 0 || c.logChunk(i/chunkSlots) != nil {
			return
		}
		atomic.StoreUint32(&p.HasRecent, 1)
		atomic.StoreUint32(&own.Look, 1)
	})
}

// logChunk sees that the slots of a chunk have memory for exits.
func (c *Collector) logChunk(chunk int) error {
	if c.recent[chunk] != nil {
		return nil
	}
	m, err := ebpf.NewMap(c.spec.Maps[collectorMapRecent].InnerMap)
	if err != nil {
		return err
	}
	h := c.region.header
	size := chunkSlots * int(h.RecentSize)
	if err := errors.Join(c.region.place(m, int(h.RecentOffset)+chunk*size, size), c.maps[collectorMapRecent].Put(uint32(chunk), m)); err != nil {
		return errors.Join(err, m.Close())
	}
	c.recent[chunk] = m
	return nil
}

// refill keeps free slots ready. When memory is short there are fewer, and exits
// that find none are counted as unattributed.
func (c *Collector) refill() {
	if c.level() == snapshot.Off {
		return
	}
	free := 0
	for i := range c.backed() {
		if atomic.LoadUint32(&c.region.slots[i].State) == abi.Free {
			free++
		}
	}
	h := c.region.header
	for ; free < pool && c.backed() < len(c.region.slots); free += chunkSlots {
		first, size := c.backed(), chunkSlots*int(h.SlotSize)
		chunk, err := ebpf.NewMap(c.spec.Maps[collectorMapChunks].InnerMap)
		if err != nil {
			return
		}
		if err := errors.Join(c.region.place(chunk, int(h.SlotOffset)+first*int(h.SlotSize), size),
			c.maps[collectorMapChunks].Put(uint32(first/chunkSlots), chunk)); err != nil {
			chunk.Close()
			return
		}
		c.chunks = append(c.chunks, chunk)
		atomic.StoreUint32(&h.SlotsBacked, uint32(first+chunkSlots))
		for i := range chunkSlots {
			c.maps[collectorMapFreeSlots].Put(nil, uint32(first+i)) // it has room for all
		}
	}
}

// counting says that exits are counted from now on, or no more.
func (c *Collector) counting(on bool) {
	h := c.region.header
	if now := c.clock.Boot(); on && h.CountedSince == 0 {
		h.CountedSince = now
	} else if !on && h.CountedSince != 0 {
		h.Counted += now - h.CountedSince
		h.CountedSince = 0
	}
}

// free gives a retired slot back.
func (c *Collector) free(id snapshot.SlotID) error {
	i := int(id.Index)
	stale := fmt.Errorf("%w: slot %d, generation %d", source.ErrStale, id.Index, id.Generation)
	if i >= c.backed() {
		return stale
	}
	p := &c.region.slots[i]
	if p.Generation != id.Generation || atomic.LoadUint32(&p.State) != abi.Retired {
		return stale
	}
	h := c.region.header
	for j := range p.NumRows {
		h.Released += p.Rows[j].Count
	}
	h.ReleasedSlots++
	atomic.StoreUint32(&p.State, abi.Free)
	*p = abi.Slot{Generation: id.Generation + 1}
	return c.maps[collectorMapFreeSlots].Put(nil, id.Index)
}

// tell sends an event to all sources. One that does not take them loses some.
func (c *Collector) tell(e source.Event) {
	for s := range c.sources {
		if s.lost {
			select {
			case s.events <- source.Event{Kind: source.Lost}:
				s.lost = false
			default:
				continue
			}
		}
		select {
		case s.events <- e:
		default:
			s.lost = true
		}
	}
}

// listen forwards the programs' events.
func (c *Collector) listen() {
	var record ringbuf.Record
	pending := false // new slots are to be looked after
	for {
		if err := c.events.ReadInto(&record); err != nil {
			return // closed
		}
		if len(record.RawSample) < int(unsafe.Sizeof(collectorVxEvent{})) {
			continue
		}
		e := *(*collectorVxEvent)(unsafe.Pointer(&record.RawSample[0]))
		kind := source.VCPUNew
		if e.State == abi.Retired {
			kind = source.VCPURetired
		}
		c.mu.Lock()
		if !c.closed {
			if kind == source.VCPUNew {
				pending = true
				// For a KVM that only its exits tell. The slot may be free by now.
				if isa := exitreason.ISA(c.region.slots[e.Slot].ISA); c.kvm != nil && c.kvm.isa == exitreason.None && isa != exitreason.None {
					c.now.isa = isa
				}
			}
			// Many come at once, and this looks at all slots.
			if pending && c.events.AvailableBytes() == 0 {
				pending = false
				c.refill()
				c.wish()
				c.log()
			}
			c.tell(source.Event{
				Kind: kind, Slot: snapshot.SlotID{Index: e.Slot, Generation: e.Generation},
				Process: int(e.Tgid), TID: int(e.Tid), VCPU: int(e.VcpuId),
			})
		}
		c.mu.Unlock()
	}
}

// watch looks after what tells nobody that it changes.
func (c *Collector) watch() {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-t.C:
		}
		c.mu.Lock()
		if !c.closed {
			c.update()
			c.tellLost()
			if c.attached >= snapshot.Time {
				c.relate()
			}
		}
		c.mu.Unlock()
	}
}
