// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// choice is a flag that takes one of a few words.
type choice struct {
	value string
	words []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return "word" }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.words, s) {
		last := len(c.words) - 1
		return fmt.Errorf("must be %s or %s", strings.Join(c.words[:last], ", "), c.words[last])
	}
	c.value = s
	return nil
}

// argument sets the choice from an argument of the command line.
func (c *choice) argument(name, s string) error {
	if err := c.Set(s); err != nil {
		return fmt.Errorf("invalid %s %q: %w", name, s, err)
	}
	return nil
}

// flag makes the choice a flag of cmd, with completion.
func (c *choice) flag(cmd *cobra.Command, flags *pflag.FlagSet, name, usage string) {
	c.flagP(cmd, flags, name, "", usage)
}

// flagP is flag with a letter.
func (c *choice) flagP(cmd *cobra.Command, flags *pflag.FlagSet, name, letter, usage string) {
	flags.VarP(c, name, letter, usage)
	register(cmd, name, cobra.FixedCompletions(c.words, cobra.ShellCompDirectiveNoFileComp))
}
