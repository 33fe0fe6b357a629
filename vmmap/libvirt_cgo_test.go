// SPDX-License-Identifier: Apache-2.0

//go:build cgo

package vmmap

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"libvirt.org/go/libvirt"
)

// eventually waits until libvirt's own goroutines have done what they should.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestClient talks to the driver within libvirt that simulates a host.
func TestClient(t *testing.T) {
	c, err := dial("test:///default")
	if err != nil {
		t.Fatal(err) // libvirt.so.0 is missing
	}
	defer c.close()
	admin, err := libvirt.NewConnect("test:///default")
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()

	find := func(name string) *record {
		records, err := c.list()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			if r.name == name {
				return &r
			}
		}
		return nil
	}
	const uuid = "00000000-1111-4222-8333-4444444444ab"
	d, err := admin.DomainDefineXML("<domain type='test'><name>a b</name><uuid>" + strings.ToUpper(uuid) +
		"</uuid><title>first</title><metadata><kubevirt xmlns='http://kubevirt.io'/></metadata><memory>8192</memory><os><type>hvm</type></os></domain>")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Free()
	title := func(s string) func() error {
		return func() error {
			return d.SetMetadata(libvirt.DOMAIN_METADATA_TITLE, s, "", "", libvirt.DOMAIN_AFFECT_CURRENT)
		}
	}
	for _, step := range []struct {
		name       string
		do         func() error
		state      State
		running    bool
		persistent bool
		title      string
	}{
		{"define", func() error { return nil }, ShutOff, false, true, "first"},
		{"retitle", title("second"), ShutOff, false, true, "second"},
		{"start", d.Create, Running, true, true, "second"},
		{"suspend", d.Suspend, Paused, true, true, "second"},
		{"retitle again", title("third"), Paused, true, true, "third"},
		{"undefine", d.Undefine, Paused, true, false, "third"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(step.name, err)
		}
		eventually(t, "event after "+step.name, func() bool { return len(c.changed()) > 0 })
		<-c.changed()
		r := find("a b")
		if r == nil || r.uuid != uuid || r.state != step.state || (r.id != nil) != step.running || r.persistent != step.persistent {
			t.Errorf("after %s: %+v", step.name, r)
		}
		want := &Metadata{Title: step.title, Cloud: &Cloud{System: "kubevirt"}}
		if diff := cmp.Diff(want, r.metadata); diff != "" {
			t.Errorf("metadata after %s (-want +got)\n%s", step.name, diff)
		}
		if again := find("a b"); again.metadata != r.metadata {
			t.Errorf("after %s metadata was asked for twice", step.name)
		}
	}
	id, err := d.GetID()
	if err != nil {
		t.Fatal(err)
	}
	if runs, err := c.exits(); err != nil || runs[Run{uuid, int(id)}] == nil {
		t.Errorf("it runs as %d; exits are told of %v, %v", id, runs, err) // there is no KVM to tell any
	}
	if err := d.Destroy(); err != nil {
		t.Fatal(err)
	}
	if r := find("a b"); r != nil {
		t.Errorf("after destroy: %+v", r)
	}
	l, _ := c.(*client)
	domains, err := l.conn.ListAllDomains(0)
	if err != nil || len(domains) == 0 {
		t.Fatal(domains, err)
	}
	defer free(domains)
	if err := domains[0].Destroy(); !errors.Is(err, libvirt.ERR_OPERATION_DENIED) {
		t.Errorf("the connection is not read-only: %v", err)
	}
}

func TestDialError(t *testing.T) {
	_, err := dial("qemu+unix:///system?socket=" + t.TempDir() + "/none")
	if err == nil || strings.Contains(err.Error(), "virError") || !errors.Is(err, libvirt.ERR_SYSTEM_ERROR) {
		t.Errorf("error %v", err)
	}
}
