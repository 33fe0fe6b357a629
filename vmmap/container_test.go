// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	podUIDText  = "0a1b2c3d-1111-4222-8333-44445555666f"
	containerID = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00"
)

func TestParseCgroup(t *testing.T) {
	const (
		underscores = "0a1b2c3d_1111_4222_8333_44445555666f"
		static      = "0123456789abcdef0123456789abcdef"
		outer       = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	)
	for _, test := range []struct{ name, in, id, pod string }{
		{"host", "0::/user.slice/user-0.slice/session-1.scope\n", "", ""},
		{"root", "0::/\n", "", ""},
		{"libvirt", "0::/machine.slice/machine-qemu\\x2d1\\x2dvm1.scope/libvirt/emulator\n", "", ""},
		{"libvirt, a name like an id", "0::/machine.slice/machine-qemu\\x2d1\\x2d" + containerID + ".scope/libvirt/vcpu0\n", "", ""},
		{"libvirt, a name like a pod", "0::/machine/qemu-1-pod" + podUIDText + ".libvirt-qemu/emulator\n", "", ""},
		{"containerd", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + underscores + ".slice/cri-containerd-" + containerID + ".scope\n", containerID, podUIDText},
		{"CRI-O, libvirt's own below", "0::/kubepods.slice/kubepods-pod" + underscores + ".slice/crio-" + containerID + ".scope/libvirt/emulator\n", containerID, podUIDText},
		{"cgroupfs", "0::/kubepods/besteffort/pod" + podUIDText + "/" + containerID + "\n", containerID, podUIDText},
		{"version 1", "12:cpu,cpuacct:/kubepods/pod" + podUIDText + "/" + containerID + "\n1:name=systemd:/\n0::/\n", containerID, podUIDText},
		{"colons", "0::/system.slice/containerd.service/kubepods-pod" + underscores + ".slice:cri-containerd:" + containerID + "\n", containerID, podUIDText},
		{"static pod", "0::/kubepods.slice/kubepods-pod" + static + ".slice/cri-containerd-" + containerID + ".scope\n", containerID, static},
		{"pod alone", "0::/kubepods/pod" + podUIDText + "\n", "", podUIDText},
		{"container in a container", "0::/docker/" + outer + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + underscores + ".slice/cri-containerd-" + containerID + ".scope\n", containerID, podUIDText},
		{"Docker", "0::/system.slice/docker-" + containerID + ".scope\n", containerID, ""},
		{"Docker, cgroupfs", "0::/docker/" + containerID + "\n", containerID, ""},
		{"Podman", "0::/machine.slice/libpod-" + containerID + ".scope/container\n", containerID, ""},
		{"an id cut short", "0::/docker/" + containerID[1:] + "\n", "", ""},
		{"no hexadecimal id", "0::/docker/" + strings.Replace(containerID, "c", "g", 1) + "\n", "", ""},
		{"pod outside Kubernetes", "0::/pod" + podUIDText + "\n", "", ""},
		{"no uid", "0::/kubepods/podium\n", "", ""},
		{"no path", "0:\n", "", ""},
		{"empty", "", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			if id, pod := parseCgroup([]byte(test.in)); id != test.id || pod != test.pod {
				t.Errorf("container %q of pod %q, want %q of %q", id, pod, test.id, test.pod)
			}
		})
	}
}

func FuzzCgroup(f *testing.F) {
	f.Add(read(f, "testdata/pod/proc/236/cgroup"))
	f.Add([]byte("12:cpu,cpuacct:/kubepods/pod" + podUIDText + "/" + containerID + "\n0::/\n"))
	f.Add([]byte("0::/a/kubepods-pod" + podUIDText + ".slice:b:" + containerID + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, pod := parseCgroup(b)
		if id != "" && (len(id) != 64 || !isHex(id)) {
			t.Errorf("container %q", id)
		}
		if pod != "" && parseUUID(pod) == "" {
			t.Errorf("pod %q", pod)
		}
	})
}

// A guest that libvirt runs in a pod, as the host sees it.
func TestPod(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, test := range []struct {
		name      string
		change    func(root string) error
		container *Container
		cloud     *Cloud
	}{
		{"recorded", func(string) error { return nil }, &Container{ID: containerID, Pod: podUIDText, PID: 44}, nil},
		{"the host's pid namespace", func(root string) error {
			return edit(root, "status", "NSpid:\t236\t44", "NSpid:\t236")
		}, &Container{ID: containerID, Pod: podUIDText, PID: 236}, nil},
		{"the host's cgroup", func(root string) error {
			return os.WriteFile(filepath.Join(root, "proc/236/cgroup"), []byte("0::/\n"), 0o600)
		}, &Container{PID: 44}, nil},
		{"no cgroups", func(root string) error {
			return os.Remove(filepath.Join(root, "proc/236/cgroup"))
		}, &Container{PID: 44}, nil},
		{"a namespace in the pod's", func(root string) error {
			return edit(root, "status", "NSpid:\t236\t44", "NSpid:\t236\t44\t1")
		}, &Container{ID: containerID, Pod: podUIDText, PID: 1}, nil},
		{"as KubeVirt has it", func(root string) error {
			return launch(root, "/usr/bin/virt-launcher-monitor", "--qemu-timeout", "256s", "--name", "web", "--uid", "F0EB9F8D-291f-404d-8f75-108cb2201369",
				"--namespace", "default", "--kubevirt-share-dir", "/var/run/kubevirt")
		}, &Container{ID: containerID, Pod: podUIDText, PID: 44},
			&Cloud{System: "kubevirt", Name: "web", Namespace: "default", InstanceUUID: "f0eb9f8d-291f-404d-8f75-108cb2201369"}},
		{"another's pod", func(root string) error {
			return launch(root, "/usr/sbin/libvirtd", "--name", "web", "--namespace", "default")
		}, &Container{ID: containerID, Pod: podUIDText, PID: 44}, nil},
		{"neither", func(root string) error {
			return edit(root, "status", "NSpid:\t236\t44", "NSpid:\t236", "cgroup", "kubepods", "system", "cgroup", containerID, "x")
		}, nil, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.CopyFS(root, os.DirFS("testdata/pod")); err != nil {
				t.Fatal(err)
			}
			if err := test.change(root); err != nil {
				t.Fatal(err)
			}
			m := New(Config{Root: root, Now: func() time.Time { return now }})
			if err := m.Refresh(); err != nil {
				t.Fatal(err)
			}
			want := []Domain{{Name: "default_web", UUID: "11111111-2222-4333-8444-0000000000ee", TGID: 236, Start: 2219 * tick, UID: id(64055),
				State: Running, Source: "proc", VCPUs: map[int]int{245: 0}, Seen: now, Container: test.container, Metadata: Metadata{Cloud: test.cloud}}}
			if diff := cmp.Diff(want, m.Domains()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// launch adds the process's parent.
func launch(root string, argv ...string) error {
	if err := os.Mkdir(filepath.Join(root, "proc/188"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "proc/188/cmdline"), []byte(strings.Join(argv, "\x00")+"\x00"), 0o600)
}

// edit replaces text in files of process 236: file, old, new.
func edit(root string, changes ...string) error {
	for i := 0; i < len(changes); i += 3 {
		path := filepath.Join(root, "proc/236", changes[i])
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(b), changes[i+1], changes[i+2])), 0o600); err != nil {
			return err
		}
	}
	return nil
}
