//! The Merkle log over the history: its leaves, its tree, its proofs and its checkpoints. It reads and writes
//! no file and no store.
//!
//! The tree is that of RFC 9162, section 2.1 (the same as in RFC 6962), so independent software can verify its proofs.
//! Its nodes are numbered in the order in which they become complete, as in the transparency logs of Go
//! (<https://pkg.go.dev/golang.org/x/mod/sumdb/tlog>): a commit only appends nodes.

mod bundle;
mod digest;
mod entry;
mod leaves;
mod note;
mod proof;
mod proven;
mod seal;
mod tree;

pub use self::{
    bundle::{BundleError, Content, Head, LogVerifier, Part, Pin},
    digest::DigestKey,
    entry::{Control, Entry, LogBegan, LogBeganReason, RecordsPruned},
    leaves::Leaves,
    note::{Checkpoint, NoteError, Signer, SigningKey, VerifyingKey},
    proof::{Consistency, Inclusion, Path, ProofError},
    proven::Proven,
    seal::{SealKeys, Sealed, SealedBy},
    tree::{Frontier, Hash, Node},
};
