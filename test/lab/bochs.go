// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// Files of Debian's packages bochs-term, bochsbios, vgabios, isolinux and syslinux-common.
const (
	bochsTerm = "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so"
	bochsBIOS = "/usr/share/bochs/BIOS-bochs-latest"
	vgaBIOS   = "/usr/share/vgabios/vgabios.bin"
	isolinux  = "/usr/lib/ISOLINUX/isolinux.bin"
	ldlinux   = "/usr/lib/syslinux/modules/bios/ldlinux.c32"
)

const bochsConfig = `
display_library: term
megs: %d
cpu: model=corei7_haswell_4770, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none
romimage: file=` + bochsBIOS + `
vgaromimage: file=` + vgaBIOS + `
ata0-master: type=cdrom, path="%s", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="%s"
com2: enabled=1, mode=file, dev="%s"
log: %s
panic: action=report
error: action=report
info: action=ignore
debug: action=ignore
`

// down is what the kernel says when it is done with the machine, which Bochs would boot again.
var down = regexp.MustCompile(`Kernel panic|reboot: `)

func (m *machine) bochs(ctx context.Context) error {
	file := func(name string) string { return filepath.Join(m.dir, name) }
	iso, serial := file("boot.iso"), file("output")
	defer os.Remove(iso)
	defer os.Remove(serial)
	if err := m.writeISO(iso); err != nil {
		return fmt.Errorf("ISO image: %w", err)
	}
	err := errors.Join(
		os.WriteFile(file("bochsrc"), fmt.Appendf(nil, bochsConfig, m.Memory, iso, m.console(), serial, file("bochs.log")), 0o644),
		os.WriteFile(file("debugger"), []byte("c\n"), 0o644),
		os.WriteFile(serial, nil, 0o644),
		os.WriteFile(m.console(), nil, 0o644))
	if err != nil {
		return err
	}
	out, err := os.Open(serial)
	if err != nil {
		return err
	}
	defer out.Close()

	// Bochs wants a terminal. It does not know how to switch itself off.
	ctx, kill := context.WithCancel(ctx)
	defer kill()
	command := fmt.Sprintf("exec bochs -q -f %s -rc %s", quote(file("bochsrc")), quote(file("debugger")))
	cmd := exec.CommandContext(ctx, "script", "-qfec", command, file("screen"))
	cmd.Env = append(os.Environ(), "TERM=xterm")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ended := make(chan error, 1)
	go func() { ended <- runBound(cmd) }()
	var screen *os.File
	defer func() { screen.Close() }()
	for {
		if screen == nil {
			screen = drainScreen(file("screen"))
		}
		select {
		case err := <-ended:
			io.Copy(m.port, out)
			if !m.port.ended.IsZero() || ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("bochs: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		case <-time.After(200 * time.Millisecond):
			if _, err := io.Copy(m.port, out); err != nil {
				return err
			}
			console, err := os.ReadFile(m.console())
			if err != nil {
				return err
			}
			if !m.port.ended.IsZero() || down.Match(console) {
				time.Sleep(time.Second) // for the last words
				io.Copy(m.port, out)
				kill()
				<-ended
				return nil
			}
		}
	}
}

var pty = regexp.MustCompile(`Bochs connected to screen "(/dev/pts/[0-9]+)"`)

// drainScreen reads the terminal that Bochs has opened for its screen, which it would otherwise wait for when it is full.
// The result is nil while Bochs has not said which it is; closing it ends the reading.
func drainScreen(log string) *os.File {
	said, err := os.ReadFile(log)
	if err != nil {
		return nil
	}
	name := pty.FindSubmatch(said)
	if name == nil {
		return nil
	}
	f, err := os.OpenFile(string(name[1]), os.O_RDONLY|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	go io.Copy(io.Discard, f)
	return f
}

// writeISO makes a CD that boots the machine's kernel.
func (m *machine) writeISO(iso string) error {
	dir, err := os.MkdirTemp(m.dir, "iso-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	config := "DEFAULT linux\nLABEL linux\nKERNEL /vmlinuz\nINITRD /initrd\nAPPEND nokaslr mitigations=off " + m.cmdline() + "\n"
	err = errors.Join(
		copyFile(filepath.Join(dir, "isolinux.bin"), isolinux),
		copyFile(filepath.Join(dir, "ldlinux.c32"), ldlinux),
		copyFile(filepath.Join(dir, "vmlinuz"), m.kernel.Image()),
		copyFile(filepath.Join(dir, "initrd"), m.initramfs()),
		os.WriteFile(filepath.Join(dir, "isolinux.cfg"), []byte(config), 0o644))
	if err != nil {
		return err
	}
	return run(dir, "xorriso", "-as", "mkisofs", "-quiet", "-o", iso,
		"-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", dir)
}

func copyFile(to, from string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o644)
}
