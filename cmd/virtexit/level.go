// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/internal/report"
)

// byDefault is the word that takes a domain's level back.
const byDefault = "default"

func (a *app) level() *cobra.Command {
	words := []string{"off", "count", "time", "recent", byDefault}
	return &cobra.Command{
		Use:   "level DOMAIN [LEVEL]",
		Short: "Show or set how much is collected of a domain",
		Long: `Show or set how much is collected of a domain. LEVEL is

  off      nothing: its exits are not counted
  count    exits by reason
  time     and their time, and where the vCPUs' time goes
  recent   and each of the latest exits, for 'virtexit log'
  default  what is collected of all domains: see 'virtexit on'

A level lasts until the domain's process or virtexitd ends. No counts are lost
by a change.`,
		Example: `  virtexit level web01           show it
  virtexit level web01 recent
  virtexit level web01 default`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.RangeArgs(1, 2)(cmd, args); err != nil {
				return err
			}
			if len(args) == 2 {
				return (&choice{words: words}).argument("level", args[1])
			}
			return nil
		},
		RunE: a.do(func(ctx context.Context, args []string) error {
			c := a.client()
			status, err := c.Status(ctx)
			if err != nil {
				return err
			}
			var l api.DomainLevel
			switch {
			case len(args) == 1:
				l, err = c.DomainLevel(ctx, args[0])
			case args[1] == byDefault:
				l, err = c.SetDomainLevel(ctx, args[0], nil)
			default:
				l, err = c.SetDomainLevel(ctx, args[0], &args[1])
			}
			if err != nil {
				return err
			}
			a.remark(status)
			return a.printLevel(l)
		}),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			switch len(args) {
			case 0:
				return a.complete(cmd, args, part)
			case 1:
				return slices.Clone(words), cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
	}
}

func (a *app) printLevel(l api.DomainLevel) error {
	level := ""
	if l.Level != nil {
		level = *l.Level
	}
	switch report.Format(a.format.value) {
	case report.JSON:
		enc := json.NewEncoder(a.stdout)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(l)
	case report.CSV:
		return csv.NewWriter(a.stdout).WriteAll([][]string{{"domain", "level", "default"}, {l.Domain, level, strconv.FormatBool(l.Default)}})
	}
	line := fmt.Sprintf("level of domain '%s' is %s", l.Domain, level)
	if l.Default {
		line += ", the default"
	}
	_, err := fmt.Fprintln(a.stdout, report.Clean(line))
	return err
}
