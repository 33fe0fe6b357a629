// SPDX-License-Identifier: Apache-2.0

package prom

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// serve serves the usual host over TCP until the test ends, which must end it
// well.
func serve(t *testing.T, webConfig string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	h := usual()
	log := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, Handler(New(h, h.config()), log), webConfig, log) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if c, err := net.Dial("tcp", l.Addr().String()); err == nil {
			c.Close()
			t.Error("somebody listens yet")
		}
	})
	return l.Addr().String()
}

// secure writes a web configuration with TLS and the user scraper.
func secure(t *testing.T) (webConfig string, roots *x509.CertPool) {
	t.Helper()
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	roots = x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	webConfig = filepath.Join(dir, "web.yml")
	for file, text := range map[string]string{
		filepath.Join(dir, "tls.crt"): string(cert),
		filepath.Join(dir, "tls.key"): string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		webConfig:                     "tls_server_config:\n  cert_file: tls.crt\n  key_file: tls.key\nbasic_auth_users:\n  scraper: " + string(hash) + "\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return webConfig, roots
}

func TestServe(t *testing.T) {
	webConfig, roots := secure(t)
	plain, private := serve(t, ""), serve(t, webConfig)
	for _, tc := range []struct {
		name, url      string
		user, password string
		method         string
		trust          *x509.CertPool
		status         int // 0: no answer
	}{
		{name: "open", url: "http://" + plain + "/metrics", status: 200},
		{name: "another path", url: "http://" + plain + "/v1/domains", status: 404},
		{name: "root", url: "http://" + plain + "/", status: 404},
		{name: "another method", url: "http://" + plain + "/metrics", method: "PUT", status: 405},
		{name: "user and password", url: "https://" + private + "/metrics", trust: roots, user: "scraper", password: "secret", status: 200},
		{name: "no user", url: "https://" + private + "/metrics", trust: roots, status: 401},
		{name: "wrong password", url: "https://" + private + "/metrics", trust: roots, user: "scraper", password: "Secret", status: 401},
		{name: "wrong user", url: "https://" + private + "/metrics", trust: roots, user: "root", password: "secret", status: 401},
		{name: "no TLS", url: "http://" + private + "/metrics", user: "scraper", password: "secret", status: 400},
		{name: "unknown certificate", url: "https://" + private + "/metrics", user: "scraper", password: "secret"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: tc.trust}}}
			r, err := http.NewRequestWithContext(t.Context(), tc.method, tc.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tc.user != "" {
				r.SetBasicAuth(tc.user, tc.password)
			}
			answer, err := c.Do(r)
			if err != nil {
				if tc.status != 0 {
					t.Error(err)
				}
				return
			}
			defer answer.Body.Close()
			body, err := io.ReadAll(answer.Body)
			if err != nil {
				t.Fatal(err)
			}
			if told := strings.Contains(string(body), `virtexit_exits_total{domain="instance-0000001a"`); answer.StatusCode != tc.status || told != (tc.status == 200) {
				t.Errorf("status %d, want %d; exits told: %t", answer.StatusCode, tc.status, told)
			}
		})
	}
}

func TestCheckWebConfig(t *testing.T) {
	good, _ := secure(t)
	dir := t.TempDir()
	for _, tc := range []struct {
		name, text, err string
	}{
		{"empty", "", ""},
		{"unknown key", "tls: {}", "field tls not found"},
		{"missing certificate", "tls_server_config: {cert_file: none.crt, key_file: none.key}", "none.crt: no such file"},
		{"password that is no hash", "basic_auth_users: {a: b}", "hashedSecret too short"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(dir, "web.yml")
			if err := os.WriteFile(file, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			err := CheckWebConfig(file)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
		})
	}
	for _, file := range []string{"", good} {
		if err := CheckWebConfig(file); err != nil {
			t.Errorf("%q: %v", file, err)
		}
	}
	if err := CheckWebConfig(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}
