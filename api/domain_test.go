// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestFind(t *testing.T) {
	id := func(n int) *int { return &n }
	uuid := func(s string) *string { return &s }
	run := uuid
	at := func(s int64) *time.Time { t := time.Unix(s, 0); return &t }
	const (
		u1 = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
		u2 = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
	)
	domains := []Domain{
		{ID: id(1), Name: "web", UUID: uuid(u1), TGID: 100, Since: at(50)},
		{Name: "web", UUID: uuid(u1), Since: at(10)},
		{ID: id(7), Name: "1", UUID: uuid(u2), TGID: 107},
		{Name: "db", UUID: uuid("11111111-1111-1111-1111-111111111111"), Since: at(30)},
		{Name: "db", UUID: uuid("11111111-1111-1111-1111-111111111111"), Since: at(40)},
		{Name: "db", UUID: uuid("11111111-1111-1111-1111-111111111111")},
		{Name: "qemu-system-x86", TGID: 500},
		{Name: "qemu-system-x86", TGID: 501},
		{Name: "twin", TGID: 0},
		{Name: "twin", TGID: 0},
		{Name: "twin", TGID: 600},
		{Name: u1, TGID: 700},
		{Name: "a/b %2F", TGID: 800},
		{ID: id(8), Name: "vm10", TGID: 900},
		{ID: id(9), Name: "vm1", TGID: 901},
		{ID: id(10), Name: "77", TGID: 902},
		{Name: "A,,b \"c\" é虚שם", TGID: 903},
		{Name: strings.Repeat("n", 200), TGID: 904},
		{Name: strings.Repeat("n", 199), TGID: 905},
		{Name: "victim", UUID: uuid("22222222-1111-1111-1111-111111111111"), TGID: 906, Since: at(99)},
		{ID: id(11), Name: "victim", UUID: uuid("22222222-1111-1111-1111-111111111111"), TGID: 907, Since: at(1)},
		{Name: "victim", TGID: 908},
		{Name: "by hand", Run: run("5-10"), Since: at(70)},
		{Name: "by hand", Run: run("6-11"), Since: at(80)},
		{Name: "by hand", Run: run("4-9")},
		{Name: "two", Run: run("1-1"), UUID: uuid(u1)},
		{Name: "two", Run: run("2-2")},
		{Name: "5-10 or so", TGID: 909, Run: run("77")},
		{Name: "2-2", TGID: 910},
	}
	for _, tt := range []struct {
		name, domain string
		want         int // index
		wantErr      string
	}{
		{name: "id", domain: "1", want: 0},
		{name: "id goes before a name of digits", domain: "7", want: 2},
		{name: "uuid goes before a name", domain: u1, want: 0},
		{name: "uuid in capitals without dashes", domain: "C7A5FDBDEDAF9455926AD65C16DB1809", want: 2},
		{name: "running goes before gone", domain: "web", want: 0},
		{name: "the latest of several runs", domain: "db", want: 4},
		{name: "the running one of several of unknown uuid", domain: "twin", want: 10},
		{name: "ugly name", domain: "a/b %2F", want: 12},
		{name: "name that begins another", domain: "vm1", want: 14},
		{name: "name that another begins", domain: "vm10", want: 13},
		{name: "name of digits that are nobody's id", domain: "77", want: 15},
		{name: "id of the domain called by a number", domain: "10", want: 15},
		{name: "uglier name", domain: "A,,b \"c\" é虚שם", want: 16},
		{name: "200 letters", domain: strings.Repeat("n", 200), want: 17},
		{name: "199 letters", domain: strings.Repeat("n", 199), want: 18},
		{name: "part of a name", domain: "vm", wantErr: "failed to get domain 'vm'"},
		{name: "name in other letters", domain: "VM1", wantErr: "failed to get domain 'VM1'"},
		{name: "32 letters that are no uuid", domain: strings.Repeat("é", 16), wantErr: "failed to get domain '" + strings.Repeat("é", 16) + "'"},
		{name: "libvirt's goes before who says so", domain: "victim", want: 20},
		{name: "libvirt's goes before who says so, by uuid", domain: "22222222-1111-1111-1111-111111111111", want: 20},
		{name: "ambiguous", domain: "qemu-system-x86", wantErr: "more than one domain is called 'qemu-system-x86': use the id, the uuid or the run"},
		{name: "the latest that has ended, without uuid", domain: "by hand", want: 23},
		{name: "run", domain: "5-10", want: 22},
		{name: "run of what is called as another is", domain: "1-1", want: 25},
		{name: "name goes before a run", domain: "77", want: 15},
		{name: "name that is another's run", domain: "2-2", want: 28},
		{name: "ended, of one the uuid is unknown", domain: "two", wantErr: "more than one domain is called 'two': use the id, the uuid or the run"},
		{name: "unknown", domain: "nope", wantErr: "failed to get domain 'nope'"},
		{name: "unknown id", domain: "99", wantErr: "failed to get domain '99'"},
		{name: "empty", domain: "", wantErr: "failed to get domain ''"},
		{name: "dashes are no uuid", domain: "----", wantErr: "failed to get domain '----'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Find(domains, tt.domain)
			if tt.wantErr != "" {
				if err == nil || err.Error() != tt.wantErr {
					t.Fatalf("error %v, want %s", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got != &domains[tt.want] {
				t.Errorf("got %+v, want %+v", *got, domains[tt.want])
			}
		})
	}
	var ambiguous *AmbiguousError
	if _, err := Find(domains, "qemu-system-x86"); !errors.As(err, &ambiguous) {
		t.Errorf("%T is no *AmbiguousError", err)
	}
}

func TestLatest(t *testing.T) {
	text := func(s string) *string { return &s }
	at := func(s int64) *time.Time { t := time.Unix(s, 0); return &t }
	one := 1
	web, db := text("4dea22b3-1d52-d8f3-2516-782e98ab3fa0"), text("c7a5fdbd-edaf-9455-926a-d65c16db1809")
	for _, tt := range []struct {
		name    string
		domains []Domain // Description tells them apart
		want    string
	}{
		{"none", nil, ""},
		{"runs, past runs before and after", []Domain{
			{Description: "a", Name: "web", UUID: web, Since: at(1)},
			{Description: "b", Name: "web", UUID: web, Since: at(3), TGID: 1, ID: &one},
			{Description: "c", Name: "web", UUID: web, Since: at(2)},
		}, "b"},
		{"runs and was not counted yet", []Domain{
			{Description: "a", Name: "web", UUID: web, Since: at(1)},
			{Description: "b", Name: "web", UUID: web, TGID: 1, ID: &one},
		}, "b"},
		{"does not run", []Domain{
			{Description: "a", Name: "web", UUID: web},
			{Description: "b", Name: "web", UUID: web, Since: at(3)},
			{Description: "c", Name: "web", UUID: web, Since: at(4)},
			{Description: "d", Name: "web", UUID: web, Since: at(2)},
		}, "c"},
		{"never counted", []Domain{{Description: "a", Name: "web", UUID: web}, {Description: "b", Name: "db", UUID: db}}, "ab"},
		{"two claim to be it", []Domain{
			{Description: "a", Name: "web", UUID: web, Since: at(1), TGID: 1, ID: &one},
			{Description: "b", Name: "web", UUID: web, Since: at(2), TGID: 2},
			{Description: "c", Name: "web", UUID: web, Since: at(3)},
		}, "ab"},
		{"one name", []Domain{
			{Description: "a", Name: "web", UUID: web, Since: at(1)},
			{Description: "b", Name: "web", UUID: db, Since: at(2)},
			{Description: "c", Name: "web", Since: at(3)},
		}, "abc"},
		{"one uuid", []Domain{{Description: "a", Name: "web", UUID: web, Since: at(1)}, {Description: "b", Name: "db", UUID: web, Since: at(2)}}, "ab"},
		{"without uuid", []Domain{
			{Description: "a", Name: "web", Since: at(2)}, {Description: "b", Name: "web", Since: at(1)}, {Description: "c", Name: "db", Since: at(1)},
		}, "ac"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			for _, d := range Latest(tt.domains) {
				got += d.Description
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
