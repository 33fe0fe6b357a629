// SPDX-License-Identifier: Apache-2.0

package vmmap

import (
	"errors"
	"path/filepath"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestParseMetadata(t *testing.T) {
	const uuid = "11111111-2222-4333-8444-00000000000a"
	domain := func(name, inner string) string {
		return "<domain id='3'><name>" + name + "</name><uuid>" + uuid + "</uuid>" + inner + "</domain>"
	}
	file := func(name string) string { return string(read(t, filepath.Join("testdata/clouds", name))) }
	ovirt := &Cloud{System: "ovirt", Name: "a", InstanceUUID: uuid}
	for _, test := range []struct {
		name, in string
		want     Metadata
		bad      bool
	}{
		{name: "nova", in: file("nova.xml"), want: Metadata{Cloud: &Cloud{
			System: "nova", Name: `web 01, "blue" & 绿`, InstanceUUID: "5f1c2e90-8a47-4d0b-9b6e-3c1d2f4a5b6c", Flavor: "m1.large",
			Project: "shop", ProjectID: "9e8d7c6b5a4f43218765fedcba098765", User: "alice", UserID: "2b0d6c8f4e1a4975a3c1d0e9f8b7a695"}}},
		{name: "nova of old", in: file("nova-1.0.xml"), want: Metadata{Cloud: &Cloud{
			System: "nova", Name: "db", InstanceUUID: "601da52c-450f-4d8e-b502-503431536f00", Flavor: "c1",
			Project: "lab", ProjectID: "5a50e9d0d19746158958be0c75970000", User: "bob", UserID: "96e9d2b749ea48fcb5a911e6f0e10000"}}},
		{name: "ovirt", in: file("ovirt.xml"), want: Metadata{Cloud: &Cloud{
			System: "ovirt", Name: "mail-01", InstanceUUID: "ccd945c8-8069-4f31-8471-bbb58e9dd600"}}},
		{name: "kubevirt", in: file("kubevirt.xml"), want: Metadata{Cloud: &Cloud{
			System: "kubevirt", Namespace: "team-a", Name: "fedora-vm.1", InstanceUUID: "f4686d2c-6e8d-4335-b8fd-81bee22f0000"}}},
		{name: "kubevirt without uid", in: domain("default_vm", `<metadata><kubevirt xmlns="http://kubevirt.io"><uid/></kubevirt></metadata>`),
			want: Metadata{Cloud: &Cloud{System: "kubevirt", Namespace: "default", Name: "vm"}}},
		{name: "kubevirt, renamed by somebody", in: domain("vm", `<metadata><kubevirt xmlns="http://kubevirt.io"/></metadata>`),
			want: Metadata{Cloud: &Cloud{System: "kubevirt"}}},
		{name: "nova, nearly empty", in: domain("a", `<metadata><n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.2"/></metadata>`),
			want: Metadata{Cloud: &Cloud{System: "nova", InstanceUUID: uuid}}},
		{name: "another's beside it", in: domain("a", `<metadata><app:x xmlns:app="urn:app"><app:name>n</app:name></app:x>
			<o:vm xmlns:o="http://ovirt.org/vm/1.0"/></metadata>`), want: Metadata{Cloud: ovirt}},
		{name: "the first of two", in: domain("a", `<metadata><o:vm xmlns:o="http://ovirt.org/vm/1.0"/><kubevirt xmlns="http://kubevirt.io"/></metadata>`),
			want: Metadata{Cloud: ovirt}},
		{name: "prefix alone", in: domain("a", `<metadata><nova:instance xmlns:nova="urn:other"><nova:name>n</nova:name></nova:instance></metadata>`)},
		{name: "another element of nova", in: domain("a", `<metadata><n:flavor xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1"/></metadata>`)},
		{name: "another element of ovirt", in: domain("a", `<metadata><o:qos xmlns:o="http://ovirt.org/vm/1.0"/></metadata>`)},
		{name: "another's element of the same name", in: domain("a_b", `<metadata><kubevirt xmlns="urn:other"/><vm xmlns="urn:other"/></metadata>`)},
		{name: "not in metadata", in: domain("a", `<devices><kubevirt xmlns="http://kubevirt.io"/></devices>`)},
		{name: "deeper", in: domain("a", `<metadata><x><kubevirt xmlns="http://kubevirt.io"/></x></metadata>`)},
		{name: "title, description", in: domain("a", "<title>Web, \"blue\" &amp; é</title><description>\n  one\n  two\n</description>"),
			want: Metadata{Title: `Web, "blue" & é`, Description: "one\n  two"}},
		{name: "nothing", in: domain("a", "")},
		{name: "another file", in: "<network><name>a</name></network>", bad: true},
		{name: "cut", in: file("nova.xml")[:300], bad: true},
		{name: "empty", bad: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := ParseMetadata([]byte(test.in))
			if diff := cmp.Diff(test.want, got); diff != "" || (err != nil) != test.bad {
				t.Errorf("error %v (-want +got)\n%s", err, diff)
			}
		})
	}
}

func FuzzMetadata(f *testing.F) {
	recorded(f, "../clouds/*.xml")
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMetadata(b)
		if err != nil {
			if m != (Metadata{}) {
				t.Errorf("%+v with %v", m, err)
			}
			return
		}
		if !utf8.ValidString(m.Title) || !utf8.ValidString(m.Description) {
			t.Errorf("%+v", m)
		}
		if c := m.Cloud; c != nil && (c.System == "" || c.InstanceUUID != "" && parseUUID(c.InstanceUUID) != c.InstanceUUID) {
			t.Errorf("%+v", c)
		}
	})
}

// The status file of a domain that runs tells the same as its XML.
func TestStatusMetadata(t *testing.T) {
	files, err := filepath.Glob("testdata/clouds/*.xml")
	if err != nil || len(files) == 0 {
		t.Fatal(err)
	}
	for _, file := range files {
		want, err := ParseMetadata(read(t, file))
		if err != nil {
			t.Fatal(err)
		}
		s, err := parseStatus([]byte("<domstatus state='running' pid='5'>" + string(read(t, file)) + "</domstatus>"))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, s.Metadata); diff != "" || want.Cloud == nil {
			t.Errorf("%s (-XML +status)\n%s", file, diff)
		}
	}
}

// Libvirt hears of a change before the file is read again, and knows nothing
// when it does not answer.
func TestWhoseMetadata(t *testing.T) {
	changed := &Metadata{Title: "changed", Cloud: &Cloud{System: "nova", Name: "n"}}
	title := "A title" // in the file
	for _, test := range []struct {
		name    string
		libvirt *Libvirt
		noFile  bool
		want    Metadata
	}{
		{"the file", nil, false, Metadata{Title: title}},
		{"libvirt", said(nil, record{id(1), "vm1", uuid1, Running, true, changed}), false, *changed},
		{"libvirt, no file", said(nil, record{id(1), "vm1", uuid1, Running, true, changed}), true, *changed},
		{"libvirt says there is none", said(nil, record{id(1), "vm1", uuid1, Running, true, new(Metadata)}), false, Metadata{}},
		{"libvirt does not tell", said(nil, record{id(1), "vm1", uuid1, Running, true, nil}), false, Metadata{Title: title}},
		{"libvirt is down", said(errors.New("down"), record{id(1), "vm1", uuid1, Running, true, changed}), false, Metadata{Title: title}},
		{"libvirt is down, no file", said(errors.New("down"), record{id(1), "vm1", uuid1, Running, true, changed}), true, *changed},
		{"another domain of libvirt", said(nil, record{id(1), "vm1", uuid10, Running, true, changed}), false, Metadata{Title: title}},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t, test.libvirt)
			if test.noFile {
				h.remove("run")
			}
			h.refresh()
			got, _ := h.Lookup(vm1, "")
			if diff := cmp.Diff(test.want, got.Metadata); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}

	t.Run("the file changes", func(t *testing.T) {
		h := newHost(t, nil)
		h.refresh()
		h.replace("run/libvirt/qemu/vm1.xml", title, "Another")
		h.refresh()
		if got, _ := h.Lookup(vm1, ""); got.Title != "Another" {
			t.Errorf("title %q", got.Title)
		}
	})
	t.Run("shut off", func(t *testing.T) {
		h := newHost(t, said(nil, record{nil, "idle", uuidIdle, ShutOff, true, changed}))
		d := h.Domains()
		if len(d) != 1 || d[0].Title != "changed" || d[0].Cloud.Name != "n" {
			t.Errorf("%+v", d)
		}
	})
	t.Run("dead", func(t *testing.T) {
		h := newHost(t, nil)
		h.refresh()
		h.remove("proc/201", "run")
		h.refresh()
		if got, _ := h.Lookup(vm1, ""); got.State != ShutOff || got.Title != title {
			t.Errorf("%+v", got)
		}
	})
}
