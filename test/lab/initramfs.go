// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
)

// Archive writes an initramfs: a cpio archive in the kernel's "newc" format. Parent directories appear by themselves.
type Archive struct {
	w    *bufio.Writer
	err  error
	ino  int
	dirs map[string]bool
}

// NewArchive starts an archive on w.
func NewArchive(w io.Writer) *Archive {
	return &Archive{w: bufio.NewWriter(w), dirs: map[string]bool{"/": true}}
}

// File types of cpio, as in mode_t.
const (
	typeDir     = 0o040000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

// Add adds a regular file of the given permissions. The name is absolute.
func (a *Archive) Add(name string, perm os.FileMode, content []byte) {
	a.parents(name)
	a.entry(name, typeFile|uint32(perm.Perm()), content)
}

// AddHost adds a file of the host, symbolic links followed, under the given name.
func (a *Archive) AddHost(name, host string) {
	if a.err != nil {
		return
	}
	content, err := os.ReadFile(host)
	if err != nil {
		a.err = err
		return
	}
	info, err := os.Stat(host)
	if err != nil {
		a.err = err
		return
	}
	a.Add(name, info.Mode(), content)
}

// Symlink adds a symbolic link.
func (a *Archive) Symlink(name, target string) {
	a.parents(name)
	a.entry(name, typeSymlink|0o777, []byte(target))
}

// Mkdir adds a directory.
func (a *Archive) Mkdir(name string) {
	if a.dirs[name] {
		return
	}
	a.dirs[name] = true
	a.parents(name)
	a.entry(name, typeDir|0o755, nil)
}

// Close ends the archive and returns the first error of all calls.
func (a *Archive) Close() error {
	a.entry("/TRAILER!!!", 0, nil)
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}

func (a *Archive) parents(name string) { a.Mkdir(path.Dir(name)) }

// entry writes a header of thirteen hexadecimal fields, the name and the content, each padded to 4 bytes.
func (a *Archive) entry(name string, mode uint32, content []byte) {
	if a.err != nil {
		return
	}
	a.ino++
	name = name[1:] + "\x00"
	_, a.err = fmt.Fprintf(a.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s%s%s%s",
		a.ino, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0,
		name, pad(110+len(name)), content, pad(len(content)))
}

func pad(n int) string { return "\x00\x00\x00"[:-n&3] }
