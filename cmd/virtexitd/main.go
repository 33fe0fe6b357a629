// SPDX-License-Identifier: Apache-2.0

// Command virtexitd collects the VM exits of this host's guests and answers
// on a unix socket.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"os/user"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"virtexit/internal/daemon"
	"virtexit/internal/prom"
	"virtexit/internal/server"
	"virtexit/internal/source/kvmstats"
	"virtexit/vmmap"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

const about = `virtexitd collects the VM exits of this host's guests, charges them to the domains
of libvirt, and answers virtexit and other clients on a unix socket.`

// options are those of the command line, beside those that load reads.
type options struct {
	*pflag.FlagSet
	file    *string
	version *bool
}

func newOptions() options {
	flags := pflag.NewFlagSet("virtexitd", pflag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors are printed once, by run
	flags.SortFlags = false
	o := options{FlagSet: flags}
	o.file = flags.String("config", defaultConfig, "configuration `FILE`")
	flags.String("socket", defaults["socket"], "listen on the unix socket `PATH`")
	flags.String("log-level", defaults["log_level"], "log messages of `LEVEL` and above: debug, info, warn, error")
	o.version = flags.Bool("version", false, "print the version")
	return o
}

// run is the program. It returns 2 for what the caller got wrong.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := newOptions()
	usage := func(err error) int {
		fmt.Fprintf(stderr, "error: %v\n", err)
		return 2
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprintf(stdout, "Usage: virtexitd [OPTION...]\n\n%s\n\n%s", about, flags.FlagUsages())
		return 0
	case err != nil:
		return usage(err)
	case flags.NArg() > 0:
		return usage(fmt.Errorf("unexpected argument %q", flags.Arg(0)))
	case *flags.version:
		fmt.Fprintln(stdout, "virtexitd", version)
		return 0
	}
	c, err := load(*flags.file, flags.Changed("config"), flags.FlagSet)
	if err != nil {
		return usage(err)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.logLevel}))
	if err := serve(ctx, c, log); err != nil {
		fmt.Fprintf(stderr, "error: %v\n", err)
		return 1
	}
	return 0
}

// serve collects and answers until ctx ends.
func serve(ctx context.Context, c config, log *slog.Logger) error {
	scraped, err := listenMetrics(c.metrics, log)
	if err != nil {
		return err
	}
	if scraped != nil {
		defer scraped.Close() // again, if it has come to Serve
	}
	socket, err := c.socket.listen(log)
	if err != nil {
		return err
	}
	servers := map[net.Listener]server.Options{socket: {AdminGroup: c.adminGroup}}
	if c.readOnly.path != "" {
		readOnly, err := c.readOnly.listen(log)
		if err != nil {
			return errors.Join(err, socket.Close())
		}
		servers[readOnly] = server.Options{ReadOnly: true}
	}
	libvirt := vmmap.NewLibvirt(c.libvirtURI, bootTime)
	guests := vmmap.New(vmmap.Config{Root: "/", Libvirt: libvirt, Now: time.Now})
	collectors := newCollectors(c, libvirt.Status, kvmstats.Options{
		Root: "/", Version: version, Exits: libvirt.Exits, Domains: guests.Domains, Thread: guests.Thread, BootTime: bootTime,
	})
	d := daemon.New(daemon.Config{
		Open:          collectors.open,
		Refused:       collectors.refused,
		Better:        collectors.better,
		Identities:    guests,
		Libvirt:       libvirt,
		On:            c.on,
		Level:         c.level,
		Duty:          c.duty,
		Interval:      c.interval,
		Retention:     c.retention,
		StateDir:      stateDir(c),
		StateInterval: c.stateInterval,
		Boot:          readID("/proc/sys/kernel/random/boot_id"),
		Machine:       readID("/etc/machine-id"),
		BootTime:      bootTime,
		CPUTime:       cpuTime,
		Kernel:        kernelRelease(),
		Version:       version,
		Log:           log,
	})
	show := prom.Handler(prom.New(d, prom.Config{Reasons: c.metrics.reasons, VCPUs: c.metrics.vcpus, Now: time.Now, BootTime: bootTime}), log)
	notify := func(state string) {
		if _, err := systemd.SdNotify(false, state); err != nil {
			log.Warn("notifying systemd", "state", state, "error", err)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		d.Run(ctx)
		return nil
	})
	for socket, options := range servers {
		options.Metrics = show
		g.Go(func() error { return server.New(d, options).Serve(ctx, socket) })
	}
	if scraped != nil {
		g.Go(func() error { return prom.Serve(ctx, scraped, show, c.metrics.webConfig, log) })
	}
	g.Go(func() error {
		watchdog(ctx, d, notify)
		return nil
	})
	log.Info("listening", "socket", c.socket.path, "version", version)
	notify(systemd.SdNotifyReady)
	<-ctx.Done()
	notify(systemd.SdNotifyStopping)
	err = g.Wait()
	return errors.Join(err, collectors.close())
}

// listen creates the socket. On a host without the group that is to read, root
// alone does.
func (l *listening) listen(log *slog.Logger) (net.Listener, error) {
	socket, err := server.Listen(l.path, l.group, l.mode)
	var unknown user.UnknownGroupError
	if errors.As(err, &unknown) {
		log.Warn("no such group: root alone can read", "group", l.group, "socket", l.path)
		return server.Listen(l.path, "", l.mode)
	}
	return socket, err
}

// listenMetrics opens the TCP port that Prometheus scrapes, nil when none is
// configured. What is wrong with that is known before collection begins.
func listenMetrics(m metrics, log *slog.Logger) (net.Listener, error) {
	if m.listen == "" {
		return nil, nil
	}
	if err := prom.CheckWebConfig(m.webConfig); err != nil {
		return nil, fmt.Errorf("metrics_web_config: %s: %w", m.webConfig, err)
	}
	if m.webConfig == "" {
		log.Warn("whoever can connect can read the metrics: metrics_web_config is empty", "address", m.listen)
	}
	l, err := net.Listen("tcp", m.listen)
	if err != nil {
		return nil, fmt.Errorf("metrics_listen: %w", err)
	}
	return l, nil
}

// stateDir is where the daemon keeps its state. What was recorded is another
// host's, or another time's.
func stateDir(c config) string {
	if c.replay != "" {
		return ""
	}
	return c.stateDir
}

// watchdog tells systemd that the daemon lives, as long as it answers.
func watchdog(ctx context.Context, d *daemon.Daemon, notify func(string)) {
	interval, err := systemd.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return
	}
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			d.Status()
			notify(systemd.SdNotifyWatchdog)
		}
	}
}

// bootTime is CLOCK_BOOTTIME, which the kernel gives start times in.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // Linux has had it since 2.6.39
	}
	return time.Duration(t.Nano())
}

// cpuTime is the processor time that this process has used.
func cpuTime() time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		panic(err) // the only failures are a bad address and a bad number
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// readID reads what names a host or a boot; it is empty where there is no such
// file.
func readID(file string) string {
	id, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		panic(err) // the only failure is a bad address
	}
	return unix.ByteSliceToString(u.Release[:])
}
