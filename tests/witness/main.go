// Verifies what the service exports, with the packages of Go's checksum database, which share no code with the service:
// without arguments, a checkpoint, a proof that its log contains an entry, and a proof that its log extends an earlier
// one, as JSON on stdin; with the public key of a log, a bundle on stdin, as `orchestrator export` writes it.
package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
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

// The lines of a bundle: a checkpoint, then parts of the log. Bytes are base64.
type line struct {
	Checkpoint   string
	First, Count int64
	Entry        []byte     // an encoded LogEntry
	Hash         *tlog.Hash // of a complete subtree whose entries were removed
}

func verifyBundle(bundle io.Reader, key string) error {
	lines := json.NewDecoder(bundle)
	var head line
	if err := lines.Decode(&head); err != nil {
		return err
	}
	size, root, err := open(head.Checkpoint, key)
	if err != nil {
		return err
	}
	var subtrees []line // complete ones, each larger than the next one
	var next int64
	for next < size {
		var part line
		if err := lines.Decode(&part); err != nil {
			return err
		}
		if part.Hash == nil {
			hash := tlog.RecordHash(part.Entry)
			part.Hash, part.Count = &hash, 1
		}
		if part.First != next || part.Count < 1 || part.Count&(part.Count-1) != 0 || next%part.Count != 0 {
			return fmt.Errorf("leaf %d does not follow leaf %d", part.First, next)
		}
		next += part.Count
		for i := len(subtrees) - 1; i >= 0 && subtrees[i].Count == part.Count; i-- {
			hash := tlog.NodeHash(*subtrees[i].Hash, *part.Hash)
			part.Hash, part.Count = &hash, 2*part.Count
			subtrees = subtrees[:i]
		}
		subtrees = append(subtrees, part)
	}
	hash := tlog.Hash(sha256.Sum256(nil)) // of the empty log
	for i := len(subtrees) - 1; i >= 0; i-- {
		if hash = tlog.NodeHash(*subtrees[i].Hash, hash); i == len(subtrees)-1 {
			hash = *subtrees[i].Hash
		}
	}
	if hash != root || next != size || lines.More() {
		return fmt.Errorf("the entries are not those of the checkpoint")
	}
	return nil
}

func main() {
	var err error
	if len(os.Args) > 1 {
		err = verifyBundle(os.Stdin, os.Args[1])
	} else {
		var p proofs
		if err = json.NewDecoder(os.Stdin).Decode(&p); err == nil {
			err = verify(p)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
