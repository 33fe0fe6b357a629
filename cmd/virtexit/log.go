// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"virtexit/api"
	"virtexit/internal/report"
)

func (a *app) log() *cobra.Command {
	var (
		q      api.LogQuery
		vcpu   int
		follow bool
		since  moment
	)
	cmd := &cobra.Command{
		Use:   "log DOMAIN",
		Short: "Show a domain's latest exits, one by one",
		Long: `Show a domain's latest exits, one by one, latest first: when, on which vCPU, for
which reason, how long it took until the guest ran on (halts and all), and the
guest's instruction pointer. Some hundred are kept for each vCPU.

The domain's level must be "recent": virtexit level DOMAIN recent

With --follow, exits are shown as they end, oldest first, until the domain
ends. Exits that come too fast for that are counted, on stderr, or in JSON on
a line of their own.

` + momentHelp,
		Example: `  virtexit log web01 --limit 20
  virtexit log web01 --vcpu 0 --reason hlt
  virtexit log web01 --since 2s
  virtexit log web01 --follow --format json`,
		Args: cobra.ExactArgs(1),
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			switch given := cmd.Flags().Changed; {
			case vcpu < 0:
				return fmt.Errorf("--vcpu %d is negative", vcpu)
			case q.Limit < 0:
				return fmt.Errorf("--limit %d is negative", q.Limit)
			case given("reason") && q.Reason == "":
				return fmt.Errorf("--reason is empty")
			case given("since") && follow:
				return errors.New("--since and --follow exclude each other")
			case given("vcpu"):
				q.VCPU = &vcpu
			}
			return nil
		},
		RunE: a.do(func(ctx context.Context, args []string) error {
			c, f := a.client(), report.Format(a.format.value)
			if !follow {
				l, err := c.Log(ctx, args[0], q)
				if err != nil {
					return err
				}
				l.Exits = slices.DeleteFunc(l.Exits, func(e api.LoggedExit) bool { return e.Time.Before(since.time) })
				return report.Log(a.stdout, l, f, a.width())
			}
			return c.Follow(ctx, args[0], q, func(l api.LogLine) error {
				if l.Overrun > 0 && f != report.JSON {
					fmt.Fprintf(a.stderr, "%d exits were overwritten before they were read\n", l.Overrun)
				}
				return report.LogLine(a.stdout, l, f, a.width())
			})
		}),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, part string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.complete(cmd, args, part)
		},
	}
	cmd.Flags().IntVar(&vcpu, "vcpu", 0, "of the vCPU `N` alone")
	cmd.Flags().StringVar(&q.Reason, "reason", "", "for this `reason` alone: a name as 'virtexit report' shows it, or a code")
	cmd.Flags().IntVar(&q.Limit, "limit", 0, "show the latest `N` (0: all; with --follow: none)")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "show exits as they end")
	since.flag(cmd, "since", "show those from `TIME` on")
	noFiles(cmd, "vcpu", "limit")
	register(cmd, "reason", a.completeReason)
	return cmd
}
