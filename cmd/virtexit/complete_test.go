// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"virtexit/api"
	"virtexit/test/lab"
)

// TestMain is the program itself when it is called by that name, as the shell
// in TestBash does.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "virtexit" {
		main()
	}
	time.Local = time.FixedZone("", 3600) // in every time zone the same
	os.Exit(m.Run())
}

// running is a domain that runs.
func running(id int, name, uuid string) api.Domain {
	d := api.Domain{Name: name, TGID: 1000 + id, State: "running"}
	if id > 0 {
		d.ID = &id
	}
	if uuid != "" {
		d.UUID = &uuid
	}
	return d
}

// ran gives a domain a run.
func ran(d api.Domain, run string) api.Domain {
	d.Run = &run
	return d
}

func TestComplete(t *testing.T) {
	const u1, u2 = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "c7a5fdbd-edaf-9455-926a-d65c16db1809"
	for _, tt := range []struct {
		name    string
		domains []api.Domain
		args    string
		want    string // a word a line
	}{
		{"names", []api.Domain{running(1, "vm1", u1), running(2, "vm10", u2)}, "report", "vm1\nvm10\n"},
		{"ugly names", []api.Domain{running(1, "a, \"b\" $(c) é虚 שם", u1), running(2, strings.Repeat("n", 200), u2)}, "report",
			"a, \"b\" $(c) é虚 שם\n" + strings.Repeat("n", 200) + "\n"},
		{"number that is nobody's id", []api.Domain{running(1, "7", u1)}, "report", "7\n"},
		{"number that is another's id", []api.Domain{running(1, "2", u1), running(2, "b", u2)}, "report", u1 + "\t2\nb\n"},
		{"another's uuid", []api.Domain{running(1, u2, u1), running(2, "b", u2)}, "report", u1 + "\t" + u2 + "\nb\n"},
		{"another's uuid, none of its own", []api.Domain{running(1, u2, ""), running(2, "b", u2)}, "report", "1\t" + u2 + "\nb\n"},
		{"twins", []api.Domain{running(1, "a", u1), running(2, "a", u2)}, "report", u1 + "\ta\n" + u2 + "\ta\n"},
		{"twins nobody can tell", []api.Domain{running(0, "a", ""), running(0, "a", ""), running(1, "b", "")}, "report", "b\n"},
		{"twins of different runs", []api.Domain{running(0, "a", ""), ran(running(0, "a", ""), "5-6"), running(1, "b", "")}, "report", "b\n5-6\ta\n"},
		{"another is shut off", []api.Domain{running(1, "a", u1), {Name: "a", UUID: ptr(u2)}}, "report", "a\n"},
		{"control characters, nothing", []api.Domain{running(1, "a\tb\x1b", u1), running(2, "", u2)}, "report", u1 + "\ta\\tb\\x1b\n" + u2 + "\n"},
		{"dash, spaces around", []api.Domain{running(1, "-x", u1), running(2, " a ", u2)}, "report", u1 + "\t-x\n" + u2 + "\t a\n"},
		{"given by name", []api.Domain{running(1, "a", u1), running(2, "b", u2)}, "report a", "b\n"},
		{"given by id and uuid", []api.Domain{running(1, "a", u1), running(2, "b", u2), running(3, "c", "")}, "report 2 " + u1, "c\n"},
		{"level", []api.Domain{running(1, "a", u1)}, "level", "a\n"},
		{"log", []api.Domain{running(1, "a", u1)}, "log", "a\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBackend()
			b.domains = tt.domains
			args := append([]string{"__complete", "--socket", serve(t, b)}, strings.Split(tt.args, " ")...)
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), append(args, ""), &stdout, &stderr); code != 0 {
				t.Errorf("exit code %d, %s", code, &stderr)
			}
			if diff := cmp.Diff(tt.want+":4\n", stdout.String()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// In each shell, with the script that it was given, the Tab key completes what is
// then executed.
func TestShells(t *testing.T) {
	onPath(t)
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("XDG_DATA_HOME", home)
	t.Setenv("TERM", "dumb")
	const bashCompletion = "/usr/share/bash-completion/bash_completion"
	for _, tt := range []struct{ name, needs, args, setup string }{
		{"bash", bashCompletion, "--norc --noprofile -i",
			"source " + bashCompletion + "; source <(virtexit completion bash)"},
		{"zsh", "zsh", "-f -i", "autoload -U compinit; compinit -u -D; source <(virtexit completion zsh)"},
		{"fish", "fish", "--no-config -i", "virtexit completion fish | source"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lab.Require(t, tt.needs)
			b := newBackend()
			b.level = ptr("time")
			t.Setenv("VIRTEXIT_SOCKET", serve(t, b))
			p := newPTY(t, 200, 50)
			p.start(tt.name, strings.Fields(tt.args)...)
			p.write(tt.setup + "; echo rea''dy\r")
			p.says("\nready")
			for _, typed := range []struct{ line, want string }{
				{"virtexit lev\t we\t rece\t\r", "level of domain 'web01' is recent"},
				{"virtexit watch --bat\t -n 1 --sort na\t\r", "exits/s, by name"},
				{"virtexit replay testdata/recorde\t --limit 3 | head -n 1\r", "6 reports over 12s"},
			} {
				p.write(typed.line)
				p.says(typed.want)
			}
		})
	}
}

// bashScript has bash complete the last of the words and prints, as bash would
// read it, the only completion there is.
const bashScript = `
_init_completion() { cur=${COMP_WORDS[COMP_CWORD]} words=("${COMP_WORDS[@]}") cword=$COMP_CWORD; } # of the package bash-completion
eval "$(virtexit completion bash)"
COMP_WORDS=(virtexit report "$1") COMP_CWORD=2 COMP_TYPE=9 COMP_WORDBREAKS=${COMP_WORDBREAKS//:}
__start_virtexit 2>/dev/null # compopt's: that this is no completion
[ ${#COMPREPLY[@]} = 1 ] || { echo "${#COMPREPLY[@]} completions"; exit 1; }
eval "printf %s ${COMPREPLY[0]}"
`

// What bash puts on the command line is the domain's name again.
func TestBash(t *testing.T) {
	onPath(t)
	for _, tt := range []struct{ name, typed string }{
		{"vm1", "vm"},
		{"two words", `two\ w`},
		{"a  b", ""},
		{"$(touch owned) `touch owned` ; touch owned", ""},
		{"comma, 'quote' \"double\" \\back", "comma"},
		{"* ? [a-z] {b,c} ~ # ! & | < >", ""},
		{"a=b", ""},
		{"a:b", ""},
		{"ünïcödé 虚拟机", ""},
		{"e\u0301clair שלום", ""},
		{strings.Repeat("n", 200), "nn"},
	} {
		t.Run(tt.name[:min(20, len(tt.name))], func(t *testing.T) {
			b := newBackend()
			b.domains = []api.Domain{running(1, tt.name, ""), running(2, "other", "")}
			typed := tt.typed
			if typed == "" {
				b.domains = b.domains[:1]
			}
			t.Setenv("VIRTEXIT_SOCKET", serve(t, b))
			cmd := exec.Command("bash", "-c", bashScript, "bash", typed)
			cmd.Dir = t.TempDir()
			out, err := cmd.CombinedOutput()
			if err != nil || string(out) != tt.name {
				t.Errorf("%q, %v; want %q", out, err, tt.name)
			}
			if left, _ := os.ReadDir(cmd.Dir); len(left) > 0 {
				t.Errorf("the shell was made to write %s", left[0].Name())
			}
		})
	}
}
