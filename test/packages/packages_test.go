// SPDX-License-Identifier: Apache-2.0

// Package packages tests what "make deb" has built.
package packages

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/test/lab"
)

// dkmsVar asks for a module that DKMS builds in the machine, which takes minutes.
const dkmsVar = "VIRTEXIT_PACKAGES_DKMS"

// TestInstall installs the packages on a Debian host, upgrades and purges them.
func TestInstall(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	c := lab.Config{Name: "packages", Kernel: "6.1", CPUs: 1, Timeout: 25 * time.Minute, Dir: root}
	c.Require(t)
	lab.Require(t, "mmdebstrap")
	kernel, err := lab.FindKernel(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	if c.System, err = lab.FindSystem(kernel.Release); err != nil {
		t.Fatal(err)
	}
	c.Command = []string{"sh", "test/packages/install.sh", "build/packages/deb"}
	if os.Getenv(dkmsVar) == "" {
		c.Command = append(c.Command, filepath.Join("build/kmod", kernel.Release, "virtexit.ko"))
	}
	var output bytes.Buffer
	c.Output = &output
	result, err := lab.Run(t.Context(), c)
	t.Logf("boot %.1f s, packages %.1f s\n%s", result.Boot.Seconds(), result.Command.Seconds(), &output)
	if err != nil {
		t.Error(err)
	}
	if result.Complaint != "" {
		t.Errorf("the kernel complains: %s", result.Complaint)
	}
}

// TestContents holds that the packages own what they are to, all of it root's and
// nothing that others may write.
func TestContents(t *testing.T) {
	lab.Require(t, "dpkg-deb")
	for pkg, want := range map[string][]string{
		"virtexit_": {
			"/etc/virtexit/virtexitd.yaml", "/usr/bin/virtexit", "/usr/lib/systemd/system/virtexitd.service",
			"/usr/lib/sysusers.d/virtexit.conf", "/usr/lib/udev/rules.d/60-virtexit.rules", "/usr/sbin/virtexitd",
		},
		"vdsm-hook-virtexit_": {"/usr/libexec/vdsm/hooks/after_get_vm_stats/50_virtexit", "/usr/libexec/virtexit-vdsm-hook"},
		"virtexit-dkms_":      {"/usr/src/virtexit-*/dkms.conf", "/usr/src/virtexit-*/uapi/virtexit.h"},
	} {
		t.Run(pkg, func(t *testing.T) {
			debs, err := filepath.Glob("../../build/packages/deb/" + pkg + "*.deb")
			if err != nil || len(debs) != 1 {
				t.Fatalf("%d packages %s, want 1: make deb", len(debs), pkg)
			}
			out, err := exec.Command("dpkg-deb", "-c", debs[0]).Output()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for line := range strings.Lines(string(out)) {
				fields := strings.Fields(line) // mode owner size date time path
				name := strings.TrimPrefix(fields[5], ".")
				if fields[0][0] != 'l' && (fields[0][5] == 'w' || fields[0][8] == 'w' || strings.ContainsAny(fields[0], "st")) || fields[1] != "root/root" {
					t.Errorf("%s: %s %s", name, fields[0], fields[1])
				}
				for _, w := range want {
					if ok, err := filepath.Match(w, name); err != nil {
						t.Fatal(err)
					} else if ok {
						got = append(got, w)
					}
				}
			}
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("files of %s (-want +got):\n%s", filepath.Base(debs[0]), diff)
			}
		})
	}
}
