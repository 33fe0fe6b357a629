// SPDX-License-Identifier: Apache-2.0

// Command virtexit shows which domain of this host causes which VM exits and
// what they cost. It asks virtexitd.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/api/client"
	"virtexit/internal/report"
)

// version is set by the linker.
var version = "dev"

// What the process exits with.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitInterrupted = 128 + int(syscall.SIGINT) // as a shell tells it
)

func main() {
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command line and returns the process's exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{
		stdin:  os.Stdin,
		stdout: stdout,
		stderr: stderr,
		socket: os.Getenv("VIRTEXIT_SOCKET"),
		format: choice{"table", []string{"table", "json", "csv"}},
	}
	if a.socket == "" {
		a.socket = api.DefaultSocket
	}
	root := a.command()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil:
		return exitOK
	case ctx.Err() != nil:
		return exitInterrupted
	case !a.started: // cobra's errors, about flags and arguments
		fmt.Fprintf(stderr, "error: %s\nTry '%s --help'.\n", strings.TrimRightFunc(err.Error(), unicode.IsSpace), cmd.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(stderr, "error: %s\n", report.Clean(err.Error()))
	return exitError
}

// app is what the commands have in common.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer
	socket         string
	format         choice
	started        bool // the command line is understood: errors are not about usage
}

func (a *app) client() *client.Client { return client.New(a.socket) }

// do makes f the work of a command.
func (a *app) do(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		return f(cmd.Context(), args)
	}
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "virtexit",
		Short: "Show which domain causes which VM exits, and what they cost",
		Long: `virtexit shows which domain of this KVM host causes which VM exits, and what
they cost. It asks virtexitd.

On a terminal tables fit its width: names are cut, then columns left out.
Elsewhere, as in a pipe or a file, they are whole, unless COLUMNS is set.

Environment:
  VIRTEXIT_SOCKET  where virtexitd listens, unless --socket is given
  COLUMNS          width of tables, where stdout is no terminal`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "FlagUsages", "FlagUsagesWrapped 80"))
	root.SetVersionTemplate("virtexit {{.Version}}\n")
	root.PersistentFlags().StringVar(&a.socket, "socket", a.socket, "`path` of virtexitd's socket")
	a.format.flag(root, root.PersistentFlags(), "format", "print as table, json or csv")
	root.AddCommand(a.list(), a.report(), a.status(), a.on(), a.off(), a.level(), a.log(), a.watch(), a.record(), a.replay(), a.completion())
	return root
}

func (a *app) list() *cobra.Command {
	var all, runs, title, owner bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List domains with their exits and where their time goes",
		Long: `List domains: their exits a second, where the time of their vCPUs goes, and the
most frequent reasons with their shares of the exits.

The time is shared by the Guest, the handling of exits by KVM and by User space
(QEMU), Idle (halted, or polling for the end of a halt) and Wait for a CPU.
All is of the time between the latest two snapshots, a second unless configured.
"-" is what is not known.

A domain counts from 0 each time that it is started: each is a run of its own,
and its counts are kept for a while when it has ended. --runs lists all of them;
'report' and others take the run for a domain.

--title and --owner show what libvirt's XML of the domain says: the title, or
without one the name in the cloud; and the cloud (nova, ovirt, kubevirt) with
the project or namespace, and the user who made the domain. Where a terminal is
too narrow they take the place of other columns. In CSV they are more columns,
with ids and the flavor; JSON always has them.`,
		Example: `  virtexit list
  virtexit list --title --owner
  virtexit list --all --format json
  virtexit list --runs`,
		Args: cobra.NoArgs,
		RunE: a.do(func(ctx context.Context, _ []string) error {
			c := a.client()
			status, err := c.Status(ctx)
			if err != nil {
				return err
			}
			domains, err := c.Domains(ctx)
			if err != nil {
				return err
			}
			switch {
			case runs:
			case all:
				domains.Domains = api.Latest(domains.Domains)
			default:
				running := []api.Domain{}
				for _, d := range domains.Domains {
					if d.Running() {
						running = append(running, d)
					}
				}
				domains.Domains = running
			}
			a.remark(status)
			if d := status.Duty; d != nil && collecting(status) {
				fmt.Fprintf(a.stderr, "collection runs for %v in every %v: rates are those of the time observed\n", time.Duration(d.OnNS), time.Duration(d.EveryNS))
			}
			return report.List(a.stdout, domains, report.ListOptions{Format: report.Format(a.format.value), Collecting: collecting(status), Runs: runs, Title: title, Owner: owner, Width: a.width()})
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "also domains that do not run, each by its latest run")
	cmd.Flags().BoolVar(&runs, "runs", false, "all runs of all domains")
	cmd.Flags().BoolVar(&title, "title", false, "show titles")
	cmd.Flags().BoolVar(&owner, "owner", false, "show for whom a cloud runs the domain")
	return cmd
}

func (a *app) report() *cobra.Command {
	var (
		interval time.Duration
		given    bool // interval
		total    bool
		by       = choice{"reason", []string{"reason", "vcpu"}}
		limit    int
	)
	cmd := &cobra.Command{
		Use:   "report [DOMAIN...]",
		Short: "Show a domain's exits by reason or by vCPU",
		Long: `Show where the time of a domain's vCPUs went, and its exits by reason or by
vCPU: how many, and how long they were handled. DOMAIN is an id, a uuid, a name
or a run, tried in this order; without it, all running domains are shown.

The time of an exit is that in which KVM or user space (QEMU) handled it, not
that of a halt or of waiting for a CPU; User is the share of user space. Max is
the longest; over an interval it is exact if it is the longest so far, else at
most twice too high. "-" is what is not known. In JSON, --limit leaves the rest
out.

Where collection paused, rates are those of the time that was observed.`,
		Example: `  virtexit report web01                    during the next second
  virtexit report web01 --interval 10s     during the next ten seconds
  virtexit report --total --limit 3        since the start, three top reasons
  virtexit report web01 db01 --by vcpu`,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			given = cmd.Flags().Changed("interval")
			switch {
			case total && given:
				return errors.New("--interval and --total exclude each other")
			case interval < api.MinInterval || interval > api.MaxInterval:
				return fmt.Errorf("--interval %v is not between %v and %v", interval, api.MinInterval, api.MaxInterval)
			case limit < 0:
				return fmt.Errorf("--limit %d is negative", limit)
			case limit > 0 && by.value != string(report.ByReason):
				return fmt.Errorf("--limit counts reasons and cannot go with --by %s", by.value)
			}
			return nil
		},
		RunE: a.do(func(ctx context.Context, domains []string) error {
			c := a.client()
			if total {
				interval = 0
			}
			status, err := c.Status(ctx)
			if err != nil {
				return err
			}
			interval = wholePeriod(status, interval, given || total)
			r, err := c.Report(ctx, domains, interval)
			if err != nil {
				return err
			}
			a.remark(status)
			if len(r.Domains) == 0 {
				fmt.Fprintln(a.stderr, "no domain is running")
			}
			return report.Report(a.stdout, r, report.Options{Format: report.Format(a.format.value), By: report.By(by.value), Limit: limit, Width: a.width()})
		}),
		ValidArgsFunction: a.complete,
	}
	cmd.Flags().DurationVar(&interval, "interval", api.DefaultInterval, "count for this `time`, beginning now; with a duty cycle, by default its period")
	cmd.Flags().BoolVar(&total, "total", false, "since the domain's start or since collection began")
	by.flag(cmd, cmd.Flags(), "by", "a row for each reason or vcpu")
	cmd.Flags().IntVar(&limit, "limit", 0, "show `N` reasons and the sum of the rest (0: all)")
	noFiles(cmd, "interval", "limit")
	return cmd
}

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show what is collected, and how",
		Long: `Show what is collected, and how; if nothing, why.

Collector is what counts: kmod, the kernel module; ebpf; or kvmstats, KVM's
statistics. Before it come those that are better, why each was refused, and what
it offers. Hook is how it learns of an exit. Slots are the collector's counters of
vCPU threads: live, retired by threads that ended, and how many there can be.

Unattributed are exits that no vCPU could be charged with, Missed those that were
counted but that nobody can tell any more.`,
		Example: `  virtexit status`,
		Args:    cobra.NoArgs,
		RunE: a.do(func(ctx context.Context, _ []string) error {
			status, err := a.client().Status(ctx)
			if err != nil {
				return err
			}
			return report.Status(a.stdout, status, report.Format(a.format.value), a.width())
		}),
	}
}

func (a *app) on() *cobra.Command {
	level := choice{"", []string{"count", "time", "recent"}}
	var duty dutyFlag
	cmd := &cobra.Command{
		Use:   "on",
		Short: "Switch collection on",
		Example: `  virtexit on
  virtexit on --level count    no times, at less cost
  virtexit on --duty 1s/10s    one second in every ten`,
		Args: cobra.NoArgs,
		RunE: a.do(func(ctx context.Context, _ []string) error {
			return a.set(ctx, api.Collection{Collection: "on", Level: level.value, Duty: duty.value})
		}),
	}
	level.flag(cmd, cmd.Flags(), "level", "what to collect: count, time or recent; by default what virtexitd is configured for")
	cmd.Flags().Var(&duty, "duty", "for how long in every period, or always; by default what virtexitd is configured for")
	noFiles(cmd, "duty")
	return cmd
}

// dutyFlag is a flag that takes a duty.
type dutyFlag struct {
	word  string
	value *api.Duty
}

func (d *dutyFlag) String() string { return d.word }
func (d *dutyFlag) Type() string   { return "on/every" }

func (d *dutyFlag) Set(s string) error {
	duty, err := api.ParseDuty(s)
	d.word, d.value = s, &duty
	return err
}

func (a *app) off() *cobra.Command {
	return &cobra.Command{
		Use:     "off",
		Short:   "Switch collection off: nothing stays attached to KVM",
		Example: `  virtexit off`,
		Args:    cobra.NoArgs,
		RunE: a.do(func(ctx context.Context, _ []string) error {
			return a.set(ctx, api.Collection{Collection: "off"})
		}),
	}
}

func (a *app) set(ctx context.Context, c api.Collection) error {
	status, err := a.client().SetCollection(ctx, c)
	if err != nil {
		return err
	}
	if a.format.value != string(report.Table) {
		return report.Status(a.stdout, status, report.Format(a.format.value), a.width())
	}
	line := "collection is " + status.Collection
	if status.Collection == "on" {
		line += ", level " + status.Level
		a.remark(status)
	}
	_, err = fmt.Fprintln(a.stdout, report.Clean(line))
	return err
}

// collecting tells whether counts move.
func collecting(s api.Status) bool { return s.Level != "off" }

// remark says on stderr why counts stand still.
func (a *app) remark(s api.Status) {
	if line := still(s); line != "" {
		a.say(line)
	}
}

// still tells why counts stand still; empty: they move.
func still(s api.Status) string {
	switch {
	case s.Problem != "":
		return "nothing is collected: " + report.Clean(s.Problem)
	case !collecting(s):
		return "collection is off: counts stand still until 'virtexit on'"
	}
	return ""
}
