//! Names of subsystems and loops.

use std::{borrow::Borrow, collections::HashSet, fmt, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::text::shortened;

/// The name of a subsystem or of a loop: 1 to 63 characters, a letter, then letters, digits, `_`, `-` or `.`.
///
/// 63 is the length of a DNS label, so that a name can also be a host name or a metric label anywhere.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// Most characters of a name.
    pub const MAX_LEN: usize = 63;

    /// Parses a name.
    ///
    /// # Errors
    /// The name breaks the rule of this type.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        // A longer text is not read to its end.
        let mut characters = name.chars().take(Self::MAX_LEN);
        let starts_well = characters.next().is_some_and(|c| c.is_ascii_alphabetic());
        let goes_on_well = characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
        if starts_well && goes_on_well && name.len() <= Self::MAX_LEN {
            Ok(Self(name.into()))
        } else {
            Err(NameError(shortened(name, NameError::SHOWN).into_owned()))
        }
    }

    /// The name as a string.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The rule for names, for messages.
    pub(super) const RULE: &str = "a name is 1 to 63 characters, a letter, then letters, digits, '_', '-' or '.'";

    /// Placeholder for a refused name, until the pass that refused it ends.
    pub(super) fn placeholder() -> Self {
        Self("".into())
    }
}

/// These names, with the present name of each subsystem that is named by a former one, each name once; `None` if no
/// name is a former one.
pub(super) fn with_present_names(names: &[Name], present: impl Fn(&Name) -> Option<Name>) -> Option<Vec<Name>> {
    let present: Vec<_> = names.iter().map(present).collect();
    if present.iter().all(Option::is_none) {
        return None;
    }
    let mut seen = HashSet::new();
    let names = names.iter().zip(present).map(|(name, present)| present.unwrap_or_else(|| name.clone()));
    Some(names.filter(|name| seen.insert(name.clone())).collect())
}

/// The name in `known` that was probably meant by `name`, if one is similar: a typing error, another case, or a prefix.
pub fn nearest<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    /// Shortest prefix: a shorter one matches too many names.
    const MIN_BEGINNING: usize = 3;
    let name = name.to_lowercase();
    let length = name.chars().count();
    let distance = |known: &str| {
        let known = known.to_lowercase();
        let far = 2 + known.len().min(name.len()) / 4;
        let is_beginning = name.len() >= MIN_BEGINNING && known.starts_with(&name);
        // A much longer text is not similar, and would take long to compare.
        if !is_beginning && length.abs_diff(known.chars().count()) >= far {
            return None;
        }
        let distance = strsim::osa_distance(&name, &known);
        (is_beginning || distance < far).then_some(distance)
    };
    let near = known.into_iter().filter_map(|known| Some((distance(known)?, known)));
    near.min_by_key(|(distance, _)| *distance).map(|(_, known)| known)
}

/// A text that is not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name: {rule}", rule = Name::RULE)]
pub struct NameError(String);

impl NameError {
    /// Most bytes of the text that are shown: one more than a name may have.
    const SHOWN: usize = 64;
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_63_characters_at_most_of_which_each_is_checked() {
        let longest = "a".repeat(Name::MAX_LEN);
        assert_eq!(Name::parse(&longest).unwrap().as_str(), longest);
        assert!(Name::parse(&format!("{longest}a")).is_err());
        assert!(Name::parse(&format!("{}!", &longest[1..])).is_err());
        let error = Name::parse(&"b".repeat(1_000_000)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("\"{}…\" is not a name", "b".repeat(61))), "{error}");
    }

    #[test]
    fn a_misspelt_name_is_recognised() {
        let known = ["prices", "news", "DreamBetCore", "a"];
        let meant = |name| nearest(name, known);
        for (name, expected) in
            [("price", "prices"), ("pirces", "prices"), ("PRICES", "prices"), ("dreambet", "DreamBetCore")]
        {
            assert_eq!(meant(name), Some(expected), "{name}");
        }
        for name in ["nobody", "de", "signals"] {
            assert_eq!(meant(name), None, "{name}");
        }
    }
}
