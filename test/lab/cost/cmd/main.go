// SPDX-License-Identifier: Apache-2.0

// Command cost boots the lab with each kernel given, on a CPU that counts instructions, measures what watching an exit costs
// there, prints a table and writes the same to a file: a JSON array of cost.Row.
//
//	cost -o FILE KERNEL [KERNEL]      in the root of the repository, with the modules for these kernels built
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"virtexit/internal/snapshot"
	"virtexit/test/lab"
	"virtexit/test/lab/cost"
)

func main() {
	out := flag.String("o", "", "JSON `file` to write")
	flag.Parse()
	measure := func() error { return bench(*out, flag.Args()) }
	if lab.Inside() {
		measure = inside
	}
	if err := measure(); err != nil {
		fmt.Fprintln(os.Stderr, "cost:", err)
		os.Exit(1)
	}
}

// inside writes rows as it gets them, one a line.
func inside() error {
	rows := json.NewEncoder(os.Stdout)
	var writeErr error
	err := cost.Bench(true, func(r cost.Row) { writeErr = errors.Join(writeErr, rows.Encode(r)) })
	return errors.Join(err, writeErr)
}

func bench(file string, kernels []string) error {
	if file == "" || len(kernels) == 0 {
		return errors.New("usage: cost -o FILE KERNEL [KERNEL]")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	var all []cost.Row
	for _, kernel := range kernels {
		rows, err := measure(ctx, kernel, exe)
		if err != nil {
			return err
		}
		if err := table(os.Stdout, rows); err != nil {
			return err
		}
		all = append(all, rows...)
	}
	fmt.Printf("%s\n", legend)
	text, err := json.MarshalIndent(all, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

const legend = `
+N is what the observer adds to an exit, the least of many; 1.0x is what virtexit adds on the stock KVM at level time.
io is a write to a port that KVM handles itself (ioeventfd), io-user one that it hands to user space, msr a read of
IA32_APIC_BASE, page-fault the first touch of a page that the host has. "BPF, clock alone" is what the kernel takes to run
two programs that read the clock, and so in each row of BPF programs that time exits. perf stat gives one count for all reasons. What an
observer executes beside, in a process of its own, is in none of these; the file's "mean_added" has it.`

// measure runs this program in the lab.
func measure(ctx context.Context, kernel, exe string) ([]cost.Row, error) {
	var out bytes.Buffer
	c := lab.Config{Name: "cost", Kernel: kernel, Icount: true, Command: []string{exe}, Timeout: 20 * time.Minute, Output: &out}
	if _, err := lab.Run(ctx, c); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out.Bytes())
	}
	var rows []cost.Row
	for lines := json.NewDecoder(&out); ; {
		var r cost.Row
		if err := lines.Decode(&r); err == io.EOF {
			return rows, nil
		} else if err != nil {
			return nil, fmt.Errorf("output of the lab: %w", err)
		}
		rows = append(rows, r)
	}
}

// kvm tells by hook which one is loaded.
var kvm = map[string]string{"tracepoint": "stock", "patch": "patched"}

// table prints one kernel's rows: the instructions that an exit takes with nothing, those that each observer adds,
// and how many times that is what virtexit adds on the stock KVM at its default level.
func table(w io.Writer, rows []cost.Row) error {
	type observer struct{ name, level, hook string }
	by := map[observer]map[cost.Exit]cost.Row{}
	var order []observer
	for _, r := range rows {
		o := observer{r.Observer, r.Level, r.Hook}
		if by[o] == nil {
			by[o] = map[cost.Exit]cost.Row{}
			order = append(order, o)
		}
		by[o][r.Exit] = r
	}
	if len(order) == 0 {
		return errors.New("the lab measured nothing")
	}
	unit := by[observer{cost.Virtexit, snapshot.Time.String(), "tracepoint"}]
	fmt.Fprintf(w, "\n%s: instructions of an exit and the entry after it\n\n", rows[0].Kernel)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(t, "KVM\tOBSERVER\tLEVEL")
	for _, exit := range cost.Exits {
		fmt.Fprintf(t, "\t%s\t", strings.ToUpper(string(exit)))
	}
	fmt.Fprintln(t)
	for i, o := range order {
		fmt.Fprintf(t, "%s\t%s\t%s", kvm[o.hook], o.name, cmp.Or(o.level, "-"))
		for _, exit := range cost.Exits {
			r := by[o][exit]
			if i == 0 {
				fmt.Fprintf(t, "\t%d\t", r.Instructions)
				continue
			}
			fmt.Fprintf(t, "\t%+d\t%.1fx", r.Added, float64(r.Added)/float64(unit[exit].Added))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}
