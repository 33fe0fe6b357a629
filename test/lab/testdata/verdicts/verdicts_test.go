// SPDX-License-Identifier: Apache-2.0

// Package verdicts ends in every way that a test can.
package verdicts

import (
	"os"
	"testing"
)

func TestPass(t *testing.T) { t.Run("with/slash", func(t *testing.T) { t.Log("said inside") }) }

func TestFail(t *testing.T) { t.Run("sub", func(t *testing.T) { t.Error("wrong") }) }

func TestSkipMachine(t *testing.T) { t.Skip("machine: has no wings") }

func TestSkip(t *testing.T) { t.Skip("no time") }

func TestExit(t *testing.T) { os.Exit(3) }

func TestNeverRun(t *testing.T) {}
