// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"virtexit/test/man"
)

var update = flag.Bool("update", false, "write the pages of the manual")

const configFile = "../../configs/virtexitd.yaml"

func TestMan(t *testing.T) {
	man.Check(t, "../..", daemonPage(), *update)
	man.Check(t, "../..", configPage(t), *update)
	man.Lint(t, "../../docs/man/virtexitd.8", "../../docs/man/virtexitd.yaml.5")
}

func daemonPage() *man.Page {
	return &man.Page{
		Name:     "virtexitd",
		Section:  8,
		Short:    "collect the VM exits of this host's guests",
		Synopsis: "[OPTION...]",
		Body: []man.Section{
			{Title: "DESCRIPTION", Text: about + `

It reads the counters of the kernel module virtexit.ko; where that is not loaded it
counts with eBPF until the module comes, see collector in virtexitd.yaml(5). While
it collects it holds a lease; when it ends, however it does, the module or the BPF
programs detach themselves from KVM. SIGTERM and SIGINT end it.

Under systemd it says when it is ready, and that it lives.`},
			{Title: "OPTIONS", Items: append(man.Options(newOptions().FlagSet), man.Item{Term: man.Bold("-h") + ", " + man.Bold("--help"), Text: "print the options"})},
			{Title: "ENVIRONMENT", Text: "Each key of virtexitd.yaml can be set as VIRTEXIT_KEY, in capitals.", Items: []man.Item{
				{Term: man.Bold("NOTIFY_SOCKET") + ", " + man.Bold("WATCHDOG_USEC"), Text: "where systemd listens, and how often it wants to hear"},
			}},
			{Title: "EXIT STATUS", Items: []man.Item{
				{Term: "0", Text: "SIGTERM or SIGINT has ended it."},
				{Term: "1", Text: "It failed, as when the socket cannot be made; stderr tells why."},
				{Term: "2", Text: "The command line or the configuration is not valid."},
			}},
			{Title: "FILES", Items: []man.Item{
				{Term: `\fI` + defaultConfig + `\fR`, Text: "the configuration"},
				{Term: `\fI` + defaults["socket"] + `\fR`, Text: "the socket"},
				{Term: `\fI` + defaults["state_dir"] + `\fR`, Text: "where totals are kept while it is down"},
			}},
			{Title: "EXAMPLES", Text: "  systemctl enable --now virtexitd\n  virtexitd --config test.yaml --socket /run/test.sock --log-level debug"},
		},
		SeeAlso: []string{"virtexit(1)", "virtexitd.yaml(5)"},
	}
}

const example = `collection: "on"
level: count
duty: 1s/10s
admin_group: wheel
`

func configPage(t *testing.T) *man.Page {
	text, err := os.ReadFile(configFile)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parse([]byte(example)); err != nil {
		t.Error(err)
	}
	about, keys := describe(string(text))
	return &man.Page{
		Name:     "virtexitd.yaml",
		Section:  5,
		Short:    "configuration of virtexitd",
		Synopsis: "in /etc/virtexit",
		Body: []man.Section{
			{Title: "DESCRIPTION", Text: about},
			{Title: "OPTIONS", Text: "With each key is its default.", Items: keys},
			{Title: "FILES", Items: []man.Item{{Term: `\fI` + defaultConfig + `\fR`, Text: "read unless virtexitd is given another with --config"}}},
			{Title: "EXIT STATUS", Text: "virtexitd ends with status 2 and names the key when a value is not valid."},
			{Title: "EXAMPLES", Text: "Exits are counted without times in one second of ten, and members of wheel may switch that:\n\n  " +
				strings.ReplaceAll(strings.TrimSpace(example), "\n", "\n  ")},
		},
		SeeAlso: []string{"virtexitd(8)", "virtexit-on(1)", "virtexit-level(1)"},
	}
}

// describe reads the file's comments: what is said of it at its beginning, and of
// the keys that follow each comment.
func describe(file string) (about string, keys []man.Item) {
	for i, stanza := range strings.Split(strings.TrimSpace(file), "\n\n") {
		var comment, terms []string
		for line := range strings.SplitSeq(stanza, "\n") {
			if said, ok := strings.CutPrefix(line, "#"); ok {
				comment = append(comment, strings.TrimPrefix(said, " "))
			} else {
				terms = append(terms, line)
			}
		}
		if i == 0 {
			about = strings.Join(comment[4:], "\n") // below the licence and the name
			continue
		}
		var items []string
		for _, term := range terms {
			key, value, _ := strings.Cut(term, ":")
			items = append(items, fmt.Sprintf("%s: %s", man.Bold(key), strings.ReplaceAll(strings.TrimSpace(value), "-", `\-`)))
		}
		keys = append(keys, man.Item{Term: strings.Join(items, "; "), Text: strings.Join(comment, "\n")})
	}
	return about, keys
}
