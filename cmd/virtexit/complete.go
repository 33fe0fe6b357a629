// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/internal/report"
)

// completion prints the script that completes in a shell.
func (a *app) completion() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print a script that completes command lines in a shell",
		Long: `Print a script that completes command lines in SHELL: bash, zsh or fish. It
offers commands, flags, their words, and the names of domains, which it asks
virtexitd for. It is installed for all three with virtexit; bash needs the
package bash-completion to load it.`,
		Example: `  source <(virtexit completion bash)       in this shell
  virtexit completion fish | source`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return err
			}
			return (&choice{words: shells}).argument("shell", args[0])
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			a.started = true
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(a.stdout)
			case "fish":
				return cmd.Root().GenFishCompletion(a.stdout, true)
			}
			return fmt.Errorf("no script for %s", args[0]) // not reached
		},
		ValidArgs: shells,
	}
}

// noFiles keeps shells from offering files for flags that take none.
func noFiles(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		register(cmd, name, cobra.NoFileCompletions)
	}
}

func register(cmd *cobra.Command, flag string, complete cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err) // the flag has just been made
	}
}

// completions are the domains to choose from. Where there is no quick answer
// there are none.
func (a *app) completions(cmd *cobra.Command) []api.Domain {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second/2)
	defer cancel()
	answer, err := a.client().Domains(ctx)
	if err != nil {
		return nil
	}
	return answer.Domains
}

// completeReason offers the reasons that the domain has had, or any domain when
// none is named yet.
func (a *app) completeReason(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	domains := a.completions(cmd)
	if len(args) > 0 {
		if d, err := api.Find(domains, args[0]); err == nil {
			domains = []api.Domain{*d}
		}
	}
	var words []cobra.Completion
	for _, d := range domains {
		for _, e := range d.Exits {
			if e.Reason == report.Clean(e.Reason) {
				words = append(words, e.Reason)
			}
		}
	}
	slices.Sort(words)
	return slices.Compact(words), cobra.ShellCompDirectiveNoFileComp
}

// complete offers running domains to the shell. Where there is no quick answer
// it offers nothing.
func (a *app) complete(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	domains := a.completions(cmd)
	given := map[*api.Domain]bool{}
	for _, arg := range args {
		if d, err := api.Find(domains, arg); err == nil {
			given[d] = true
		}
	}
	var words []cobra.Completion
	for i := range domains {
		if d := &domains[i]; d.Running() && !given[d] {
			if word := completion(domains, d); word != "" {
				words = append(words, word)
			}
		}
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}

// completion is what can be typed to mean the domain: its name; or its uuid, id
// or run, described by the name, when the name means another or cannot be typed;
// or nothing.
func completion(domains []api.Domain, d *api.Domain) cobra.Completion {
	means := func(word string) bool {
		found, err := api.Find(domains, word)
		return err == nil && found == d
	}
	name := report.Clean(d.Name)
	switch {
	// The shell reads one word a line, without spaces around it, and takes a
	// leading dash for a flag.
	case name != "" && name == d.Name && name == strings.TrimSpace(name) && !strings.HasPrefix(name, "-") && means(name):
		return name
	case d.UUID != nil && means(*d.UUID):
		return cobra.CompletionWithDesc(*d.UUID, name)
	case d.ID != nil && means(strconv.Itoa(*d.ID)):
		return cobra.CompletionWithDesc(strconv.Itoa(*d.ID), name)
	case d.Run != nil && means(*d.Run):
		return cobra.CompletionWithDesc(*d.Run, name)
	}
	return ""
}
