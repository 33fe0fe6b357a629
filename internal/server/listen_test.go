// SPDX-License-Identifier: Apache-2.0

package server

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made", "here", "sock")
	gid := os.Getgid()
	if os.Getuid() == 0 {
		gid = 65432
	}
	l, err := Listen(path, strconv.Itoa(gid), 0o660)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := mode(t, path), fs.ModeSocket|0o660; got != want {
		t.Errorf("socket has mode %v, want %v", got, want)
	}
	if got := mode(t, filepath.Dir(path)).Perm() &^ 0o755; got != 0 {
		t.Errorf("directory has mode bits %v too many", got)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Gid; int(got) != gid {
		t.Errorf("group %d, want %d", got, gid)
	}
	if _, err := Listen(path, "", 0o660); !errors.Is(err, ErrRunning) {
		t.Errorf("second Listen: %v, want ErrRunning", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the socket is still there: %v", err)
	}
}

// Before its group is set, nobody else can open the socket.
func TestListenPrivate(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "sock")
	l, err := listenPrivate(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got, want := mode(t, path), fs.ModeSocket|0o600; got != want {
		t.Errorf("mode %v, want %v", got, want)
	}
}

func TestListenReplacesStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	l, err := Listen(path, "", 0o660)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, group, want string }{
		{"a file is not removed", file, "", "exists and is not a socket"},
		{"unknown group", filepath.Join(dir, "s"), "no-such-group", "group 'no-such-group'"},
		{"directory is a file", filepath.Join(file, "s"), "", "not a directory"},
		{"path too long", filepath.Join(dir, strings.Repeat("x", 120)), "", "invalid argument"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := Listen(tt.path, tt.group, 0o660)
			if err == nil {
				l.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.path) {
				t.Errorf("error %q does not name %q and the path", err, tt.want)
			}
		})
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is now %q, %v", b, err)
	}
}
