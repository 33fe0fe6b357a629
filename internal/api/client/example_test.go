// SPDX-License-Identifier: Apache-2.0

package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"time"

	"virtexit/internal/api"
	"virtexit/internal/api/client"
)

// Prints the busiest reason of each domain every five seconds, and begins anew when
// the daemon is started again.
func Example() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	virtexit := client.New(api.DefaultSocket)
	for ctx.Err() == nil {
		err := virtexit.Watch(ctx, nil, 5*time.Second, func(r api.Report) error {
			for _, d := range r.Domains {
				if len(d.Exits) > 0 {
					fmt.Printf("%s: %.1f exits/s, %.0f%% %s\n", d.Name, d.Rate, 100*d.Exits[0].Share, d.Exits[0].Reason)
				}
			}
			return nil
		})
		var refused *client.StatusError
		if errors.As(err, &refused) {
			log.Print(err)
		}
		time.Sleep(time.Second)
	}
}
