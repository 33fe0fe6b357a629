// SPDX-License-Identifier: Apache-2.0

package prom

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	"golang.org/x/net/netutil"
)

// Limits of what scrapers may take from the daemon.
const (
	maxScrapes = 8  // at once; they share one collection
	maxConns   = 32 // over TCP
	slow       = 30 * time.Second
)

// Handler answers with the metrics of the collector, of Go's and of the process,
// in the format that the client asks for.
func Handler(c *Collector, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelError),
		MaxRequestsInFlight: maxScrapes,
		CoalesceGather:      true,
	})
}

// CheckWebConfig tells what is wrong with a file of exporter-toolkit's; empty:
// there is none.
func CheckWebConfig(file string) error { return web.Validate(file) }

// Serve answers on the listener, at /metrics alone, until ctx ends, and closes
// it. The web configuration, of exporter-toolkit's kind, tells of TLS and of
// users; without one, whoever connects can read.
func Serve(ctx context.Context, l net.Listener, metrics http.Handler, webConfig string, log *slog.Logger) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: slow,
		ReadTimeout:       slow,
		WriteTimeout:      slow,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err := web.Serve(netutil.LimitListener(l, maxConns), srv, &web.FlagConfig{WebConfigFile: &webConfig}, log)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return errors.Join(err, srv.Close())
}
