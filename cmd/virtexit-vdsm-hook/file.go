// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// maxFile is, in bytes, some ten times the statistics of 1,000 VMs.
const maxFile = 64 << 20

// file is what VDSM hands to a hook.
type file struct {
	path string
	mode os.FileMode
	text []byte
}

// read reads a file. It waits for nobody to write one that is a pipe.
func read(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return file{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return file{}, err
	}
	if !info.Mode().IsRegular() {
		return file{}, fmt.Errorf("%s is not a regular file", path)
	}
	if info.Size() > maxFile {
		return file{}, fmt.Errorf("%s is longer than %d bytes", path, maxFile)
	}
	text, err := io.ReadAll(f)
	return file{path, info.Mode().Perm(), text}, err
}

// replace puts another in the place of the file. At every moment there is the
// one or the other, whole; both are the hook's own user's, who is VDSM's.
func (f *file) replace(text []byte) (err error) {
	next, err := os.CreateTemp(filepath.Dir(f.path), filepath.Base(f.path)+".")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(next.Name()))
		}
	}()
	_, err = next.Write(text)
	err = errors.Join(err, next.Chmod(f.mode), next.Close())
	if err != nil {
		return err
	}
	return os.Rename(next.Name(), f.path)
}
