// SPDX-License-Identifier: Apache-2.0

// Package stranger is a server that is not virtexitd, for tests of clients.
package stranger

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// Answer serves the same bytes to each connection once it has sent something, and
// returns the socket, which other users can reach as far as its mode lets them.
func Answer(t *testing.T, answer string) (socket string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.Read(make([]byte, 1))
				io.WriteString(c, answer)
				io.Copy(io.Discard, c) // until the client hangs up
			}()
		}
	}()
	return socket
}
