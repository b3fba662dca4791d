//! The processes of one orchestrator.

use std::{collections::BTreeMap, iter, sync::Arc};

use super::{Endpoint, Epoch};

/// One process of an orchestrator, which may have several over one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Its name, for people: by the rule of [`is_orchestrator_id`](super::is_orchestrator_id). Two replicas should not
    /// have the same one, but nothing depends on that.
    pub name: String,
    /// Where the other replicas reach its gRPC server, over `http` or `https`; `None` if it has not said so.
    pub address: Option<Endpoint>,
}

/// The replica that leads: it alone runs cycles and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The replica.
    pub replica: Replica,
    /// Its term.
    pub epoch: Epoch,
}

/// What a replica does at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader {
        /// Its term.
        epoch: Epoch,
    },
    /// It does not, and takes over once no other replica leads.
    Follower {
        /// The replica that leads, as far as it is known; never this one.
        leader: Option<Leader>,
    },
}

impl Role {
    /// The term, if it leads.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Leader { epoch } => Some(*epoch),
            Self::Follower { .. } => None,
        }
    }
}

/// What the settings are that the replicas of one orchestrator should have in common: a digest of each. One replica
/// tells them to another, as a text of words: the version of the software, and `KEY=DIGEST` for each setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommonSettings(Arc<str>);

impl CommonSettings {
    /// Those with these digests, by their keys, of this version of the software.
    pub fn of<'a>(version: &str, digests: impl IntoIterator<Item = (&'a str, u32)>) -> Self {
        let words = digests.into_iter().map(|(key, digest)| format!(" {key}={digest:08x}"));
        Self(iter::once(version.to_owned()).chain(words).collect::<String>().into())
    }

    /// Those with this text, which another replica has told.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(text.into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The keys of these settings that are not as in `other`. None if the other replica has another version of this
    /// software, which may have other settings.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a str> {
        let (version, own) = self.words();
        let (other_version, others) = other.words();
        let others: BTreeMap<_, _> = others.collect();
        let is_comparable = version == other_version;
        own.filter(move |(key, digest)| is_comparable && others.get(key) != Some(digest)).map(|(key, _)| key)
    }

    /// The version, and the digests by their keys.
    fn words(&self) -> (&str, impl Iterator<Item = (&str, &str)>) {
        let (version, settings) = self.0.split_once(' ').unwrap_or((&self.0, ""));
        (version, settings.split(' ').filter_map(|word| word.split_once('=')))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_compared_by_their_keys_with_those_of_the_same_version() {
        let of = |version, digests: &[(&'static str, u32)]| CommonSettings::of(version, digests.iter().copied());
        let own = of("1.0.0", &[("cycle.deadline", 1), ("loops", 2), ("subsystems", 3)]);
        let told = |other: &CommonSettings| CommonSettings::parse(other.as_str());
        let differing = |other: &CommonSettings| own.differing(&told(other)).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(differing(&own), [""; 0]);
        assert_eq!(differing(&of("1.0.0", &[("subsystems", 4), ("loops", 2)])), ["cycle.deadline", "subsystems"]);
        assert_eq!(differing(&of("1.1.0", &[("subsystems", 4)])), [""; 0]);
        // Whatever another process says.
        for text in ["", " ", "= =", "1.0.0"] {
            assert!(own.differing(&CommonSettings::parse(text)).count() <= 3, "{text}");
        }
    }
}
