//! Commits whose outcome can be unknown for a while, because the database is at the other end of a connection.
//!
//! A commit is one statement. It writes only if the row `meta` has the token of the commit before it, and gives that
//! row its own. No two statements of any process have the same token, so the row shows which of them was the last one.
//!
//! If the answer to a commit is lost, nobody knows whether it was executed, or still will be. To read the row would not
//! help: what is read may be lost in a failover, and the statement may be on its way. So a *barrier* is written: a
//! statement that gives the row its own token if this is still the one before the commit, or that of the commit, and
//! returns which of them it has found. Once it is acknowledged, so is a commit that it has found; and one that it has
//! not found can't be executed any more, since the token that it needs is gone. The answer to a barrier can be lost as
//! well. The next one then also accepts the tokens of earlier barriers, which have noted what they have found.
//!
//! A barrier that is executed late finds none of its tokens, and writes nothing: without that condition, it would seem
//! to later commits that another process had taken over.
//!
//! The row can also have a token of another process that has kept nothing: of a barrier, after a first commit that
//! was not executed. This process sees that nothing else has changed, by the epoch, the number of commits and the
//! claim, and goes on from that token. That is safe. A token belongs to one state of the row, so a statement that is
//! executed on this one builds on the state that was read; and if a failover undoes that state, the statement finds
//! another token and writes nothing. While the outcome of an own commit is unknown, only a barrier goes on from such a
//! token. The number of commits says whether the commit is part of that state, since no other process commits in an
//! epoch that this one has begun. Of a first commit in an epoch it does not say that: another process can have chosen
//! the same epoch. So this process then ends, as if it were fenced.

use std::{future::Future, time::Duration};

use tokio::time::sleep;

use crate::{model::Epoch, ports::StoreError};

/// Pauses before barriers whose predecessor had no answer: the first one, which is doubled each time, and the longest
/// one. A failover takes seconds.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The number of a commit or of a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Token(pub(super) i64);

impl Token {
    fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// A barrier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Barrier {
    /// The token that the row gets.
    pub(super) token: Token,
    /// Tokens that the row has while the commit is not executed: the one that the commit needs, and those of other
    /// processes that have kept nothing. If the row has one of them, the barrier notes and returns it.
    pub(super) before: Vec<Token>,
    /// Tokens that the row has once the commit is executed, likewise: that of the commit, and those of other processes.
    pub(super) after: Vec<Token>,
    /// The tokens of earlier barriers of the same commit. If the row has one of them, the barrier returns what that one
    /// has noted.
    pub(super) earlier: Vec<Token>,
}

impl Barrier {
    /// True if it is executed on a row with this token, and then notes and returns it.
    pub(super) fn notes(&self, token: Token) -> bool {
        self.before.contains(&token) || self.after.contains(&token)
    }

    /// True if it is executed on a row with this token.
    fn accepts(&self, token: Token) -> bool {
        self.notes(token) || self.earlier.contains(&token)
    }
}

/// The answer to a commit or a barrier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer<T> {
    /// It was executed, and survives the loss of every machine that the database is set up to survive.
    Executed(T),
    /// The row has another token. Nothing was written.
    Superseded,
    /// It was not executed, and never will be.
    Refused(StoreError),
    /// It may have been executed, or may be executed later, or neither.
    Lost(StoreError),
}

impl<T> Answer<T> {
    /// The same answer, with something else in place of what was returned.
    pub(super) fn map<U>(self, to: impl FnOnce(T) -> U) -> Answer<U> {
        match self {
            Self::Executed(returned) => Answer::Executed(to(returned)),
            Self::Superseded => Answer::Superseded,
            Self::Refused(error) => Answer::Refused(error),
            Self::Lost(error) => Answer::Lost(error),
        }
    }

    /// The answer where nothing depends on whether a lost statement was executed; `None` if the row has another token.
    ///
    /// # Errors
    /// It was refused, or the answer was lost.
    pub(super) fn returned(self) -> Result<Option<T>, StoreError> {
        match self {
            Self::Executed(returned) => Ok(Some(returned)),
            Self::Superseded => Ok(None),
            Self::Refused(error) | Self::Lost(error) => Err(error),
        }
    }
}

/// The row, as far as a commit depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) epoch: Epoch,
    /// Number of commits so far.
    pub(super) commits: u64,
    /// The last epoch for which a replica has claimed to lead. A claim gives the row a new token before it commits
    /// anything.
    pub(super) claimed: Epoch,
    /// Of the last commit or barrier.
    pub(super) token: Token,
}

impl Stored {
    /// True if the row was replaced by an older one than this was.
    fn precedes(&self, known: &Self) -> bool {
        let lacks_commits = self.epoch == known.epoch && self.commits < known.commits;
        self.epoch < known.epoch || self.claimed < known.claimed || lacks_commits
    }
}

/// The database, as far as the outcome of one commit depends on it. Each call is one statement.
pub(super) trait Database {
    /// Commits what is to be committed, if the row has the token `after`, and gives it `token`.
    fn commit(&mut self, after: Token, token: Token) -> impl Future<Output = Answer<()>> + Send;

    /// Gives the row the token of the barrier, if it has one of those that this accepts. Returns one that it notes.
    fn bar(&mut self, barrier: &Barrier) -> impl Future<Output = Answer<Token>> + Send;

    /// Reads the row.
    fn read(&mut self) -> impl Future<Output = Result<Stored, StoreError>> + Send;
}

/// The commits of one process, from the one on that takes the store over.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// The location of the store, for people.
    store: String,
    epoch: Epoch,
    /// What the row said after the last commit that was acknowledged, or before the first one, what an earlier process
    /// has left. Its token is the one that the row had last, as far as this process knows.
    stored: Stored,
    /// The last one that was given.
    given: Token,
}

impl Chain {
    /// Commits of this epoch, after a row that says this. `given` is the token before the first one that they and
    /// their barriers get: chosen at random, so that no other process has the same ones.
    pub(super) fn new(store: String, epoch: Epoch, stored: Stored, given: Token) -> Self {
        Self { store, epoch, stored, given }
    }

    /// Commits. Returns once the outcome is known, however long that takes.
    ///
    /// # Errors
    /// Nothing was kept, and nothing will be.
    pub(super) async fn commit(&mut self, database: &mut impl Database) -> Result<(), StoreError> {
        let token = self.give();
        match database.commit(self.stored.token, token).await {
            Answer::Executed(()) => {
                self.kept(token);
                Ok(())
            }
            Answer::Superseded => {
                let now = database.read().await?;
                if !self.is_unchanged(now) {
                    return Err(self.superseded(now));
                }
                self.stored.token = now.token;
                let problem = "another process was in the way, which has kept nothing".into();
                Err(StoreError::Unavailable { store: self.store.clone(), problem })
            }
            Answer::Refused(error) => Err(error),
            Answer::Lost(error) => self.resolve(database, token, error).await,
        }
    }

    /// True if a row with this state lacks commits that were acknowledged to this process.
    pub(super) fn is_replaced_by(&self, now: &Stored) -> bool {
        now.precedes(&self.stored)
    }

    /// Finds out the outcome of a commit whose answer was lost.
    async fn resolve(
        &mut self,
        database: &mut impl Database,
        commit: Token,
        lost: StoreError,
    ) -> Result<(), StoreError> {
        // Eight bytes for each answer that is lost, and each process that has kept nothing: at most one in a second.
        let (before, after) = (vec![self.stored.token], vec![commit]);
        let mut barrier = Barrier { token: self.give(), before, after, earlier: Vec::new() };
        let mut pause = FIRST_PAUSE;
        loop {
            match database.bar(&barrier).await {
                Answer::Executed(found) if barrier.after.contains(&found) => {
                    self.kept(barrier.token);
                    return Ok(());
                }
                Answer::Executed(_) => {
                    self.stored.token = barrier.token;
                    return Err(lost);
                }
                Answer::Superseded => match database.read().await {
                    Ok(now) if barrier.accepts(now.token) => {}
                    Ok(now) if self.is_unchanged(now) => barrier.before.push(now.token),
                    Ok(now) if self.has_next(now) => barrier.after.push(now.token),
                    Ok(now) => return Err(self.superseded(now)),
                    // Such as that the store was moved.
                    Err(error) if error.is_final() => return Err(error),
                    Err(_) => {}
                },
                // The same one again.
                Answer::Refused(_) => {}
                Answer::Lost(_) => {
                    barrier.earlier.push(barrier.token);
                    barrier.token = self.give();
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// True if the row has what this process knows of, and nothing else, whichever token it has.
    fn is_unchanged(&self, now: Stored) -> bool {
        now == Stored { token: now.token, ..self.stored }
    }

    /// True if the row has that, and one more commit of this process.
    fn has_next(&self, now: Stored) -> bool {
        let next = Stored { commits: self.stored.commits + 1, token: now.token, ..self.stored };
        self.stored.epoch == self.epoch && now == next
    }

    /// The error for a row with another state than the last one of this process.
    fn superseded(&self, now: Stored) -> StoreError {
        let Self { store, epoch, stored, .. } = self;
        if now.precedes(stored) {
            let problem = format!(
                "it has {} commits, the last ones of epoch {}, and {} were acknowledged, the last ones of epoch {}: an \
                 older copy has replaced it, such as a standby that did not have all of them",
                now.commits, now.epoch, stored.commits, stored.epoch
            );
            return StoreError::Corrupt { store: store.clone(), problem };
        }
        // Another process that commits in this epoch was in the way, unless this one has begun it.
        let by = now.epoch.max(now.claimed);
        if by > *epoch || stored.epoch < *epoch {
            return StoreError::Fenced { by };
        }
        let problem = format!(
            "{store} has {} commits in the epoch of this process, which knows of {}",
            now.commits, stored.commits
        );
        StoreError::Defect { problem }
    }

    /// The commit was acknowledged, and then the row had this token.
    fn kept(&mut self, last: Token) {
        self.stored = Stored { epoch: self.epoch, commits: self.stored.commits + 1, token: last, ..self.stored };
    }

    /// A token that nothing has yet.
    fn give(&mut self) -> Token {
        self.given = self.given.next();
        self.given
    }
}

#[cfg(test)]
mod tests;
