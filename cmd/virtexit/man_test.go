// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/test/man"
)

// Every command has a page in docs/man, made of its help.
func TestMan(t *testing.T) {
	a := &app{socket: api.DefaultSocket, format: choice{"table", []string{"table", "json", "csv"}}}
	root := a.command()
	commands := append([]*cobra.Command{root}, root.Commands()...)
	var names, files []string
	for _, cmd := range commands {
		p := page(cmd)
		names = append(names, p.Name+".1")
		files = append(files, "../../docs/man/"+p.Name+".1")
		t.Run(p.Name, func(t *testing.T) { man.Check(t, "../..", p, *update) })
	}
	entries, err := os.ReadDir("../../docs/man")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".1") && !slices.Contains(names, e.Name()) {
			t.Errorf("docs/man/%s: there is no such command", e.Name())
		}
	}
	man.Lint(t, files...)
}

var mentioned = regexp.MustCompile(`'virtexit (\w+)`)

func page(cmd *cobra.Command) *man.Page {
	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	_, synopsis, _ := strings.Cut(cmd.Use, " ")
	p := &man.Page{
		Name:     strings.ReplaceAll(cmd.CommandPath(), " ", "-"),
		Section:  1,
		Short:    strings.ToLower(cmd.Short[:1]) + cmd.Short[1:],
		Synopsis: strings.TrimSpace(synopsis + " [OPTION...]"),
	}
	about := cmd.Long
	if about == "" {
		about = cmd.Short + "."
	}
	about, environment, _ := strings.Cut(about, "\n\nEnvironment:\n")
	p.Body = append(p.Body, man.Section{Title: "DESCRIPTION", Text: about})
	if cmd.HasSubCommands() {
		p.Synopsis = "COMMAND [ARGUMENT...] [OPTION...]"
		commands := man.Section{Title: "COMMANDS", Text: "Each has a page of its own."}
		for _, sub := range cmd.Commands() {
			commands.Items = append(commands.Items, man.Item{Term: man.Bold(sub.Name()), Text: sub.Short + "."})
			p.SeeAlso = append(p.SeeAlso, "virtexit-"+sub.Name()+"(1)")
		}
		p.Body = append(p.Body, commands)
	} else {
		p.SeeAlso = append(p.SeeAlso, "virtexit(1)")
		for _, m := range mentioned.FindAllStringSubmatch(cmd.Long, -1) {
			if ref := "virtexit-" + m[1] + "(1)"; m[1] != cmd.Name() && !slices.Contains(p.SeeAlso, ref) {
				p.SeeAlso = append(p.SeeAlso, ref)
			}
		}
	}
	p.SeeAlso = append(p.SeeAlso, "virtexitd(8)")
	p.Body = append(p.Body,
		man.Section{Title: "OPTIONS", Items: append(man.Options(cmd.LocalFlags()), man.Options(cmd.InheritedFlags())...)},
		man.Section{Title: "EXIT STATUS", Items: []man.Item{
			{Term: "0", Text: "It is done."},
			{Term: "1", Text: "It failed; stderr tells why."},
			{Term: "2", Text: "The command line is not valid."},
			{Term: "130", Text: "SIGINT, SIGTERM or SIGHUP has ended it. 'virtexit record' is ended so, with status 0."},
		}},
		man.Section{Title: "FILES", Items: []man.Item{
			{Term: `\fI` + api.DefaultSocket + `\fR`, Text: "The socket where virtexitd answers. Who can open it can read: root and the members of its group."},
		}})
	if environment != "" {
		p.Body = append(p.Body, man.Section{Title: "ENVIRONMENT", Text: environment})
	}
	if cmd.Example != "" {
		p.Body = append(p.Body, man.Section{Title: "EXAMPLES", Text: cmd.Example})
	}
	return p
}
