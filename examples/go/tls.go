package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// serverCredentials is TLS with the files in dir, or none if dir is empty. Each client needs a certificate whose only
// URI is caller: the authority has signed those of other subsystems as well. The files are read again for each
// connection.
func serverCredentials(dir, caller string) (credentials.TransportCredentials, error) {
	if dir == "" {
		return insecure.NewCredentials(), nil
	}
	current := func(*tls.ClientHelloInfo) (*tls.Config, error) {
		own, authorities, err := read(dir)
		if err != nil {
			return nil, err
		}
		return &tls.Config{
			Certificates: []tls.Certificate{own},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    authorities,
			VerifyConnection: func(state tls.ConnectionState) error {
				uris := state.PeerCertificates[0].URIs
				if len(uris) != 1 || uris[0].String() != caller {
					return fmt.Errorf("only %s may call", caller)
				}
				return nil
			},
		}, nil
	}
	if _, err := current(nil); err != nil { // Otherwise it would only be noticed by the first connection.
		return nil, err
	}
	return credentials.NewTLS(&tls.Config{GetConfigForClient: current}), nil
}

// clientCredentials is TLS with the files in dir, or none if dir is empty.
func clientCredentials(dir string) (credentials.TransportCredentials, error) {
	if dir == "" {
		return insecure.NewCredentials(), nil
	}
	own, authorities, err := read(dir)
	if err != nil {
		return nil, err
	}
	return credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{own}, RootCAs: authorities}), nil
}

// read reads the certificate and the authorities in a directory that `orchestrator certs issue` has made.
func read(dir string) (own tls.Certificate, authorities *x509.CertPool, err error) {
	own, err = tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return own, nil, err
	}
	ca := filepath.Join(dir, "ca.pem")
	pem, err := os.ReadFile(ca)
	if err != nil {
		return own, nil, err
	}
	authorities = x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return own, nil, fmt.Errorf("%s contains no certificate", ca)
	}
	return own, authorities, nil
}
