// Verifies a checkpoint, a proof that its log contains an entry, and a proof that its log extends an earlier one: with
// the packages of Go's checksum database, which share no code with the service.
package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Proofs as a JSON object on stdin. Bytes are base64.
type proofs struct {
	Key        string // the public key of the log
	Checkpoint string
	Entry      []byte // an encoded LogEntry
	Leaf       int64
	Inclusion  []tlog.Hash
	Earlier    string // an earlier checkpoint
	Extension  []tlog.Hash
}

// The size and the root of a signed checkpoint.
func open(checkpoint, key string) (size int64, root tlog.Hash, err error) {
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return 0, root, err
	}
	opened, err := note.Open([]byte(checkpoint), note.VerifierList(verifier))
	if err != nil {
		return 0, root, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 {
		return 0, root, fmt.Errorf("a checkpoint has three lines: %q", opened.Text)
	}
	if size, err = strconv.ParseInt(lines[1], 10, 64); err != nil {
		return 0, root, err
	}
	hash, err := base64.StdEncoding.DecodeString(lines[2])
	copy(root[:], hash)
	return size, root, err
}

func verify(p proofs) error {
	size, root, err := open(p.Checkpoint, p.Key)
	if err != nil {
		return err
	}
	if err := tlog.CheckRecord(p.Inclusion, size, root, p.Leaf, tlog.RecordHash(p.Entry)); err != nil {
		return err
	}
	earlierSize, earlierRoot, err := open(p.Earlier, p.Key)
	if err != nil {
		return err
	}
	return tlog.CheckTree(p.Extension, size, root, earlierSize, earlierRoot)
}

func main() {
	var p proofs
	err := json.NewDecoder(os.Stdin).Decode(&p)
	if err == nil {
		err = verify(p)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
