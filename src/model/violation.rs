//! The problems of an input, field by field.

use std::{collections::HashSet, fmt, ops::RangeInclusive, sync::Arc, time::Duration};

use jiff::SignedDuration;

use super::{Name, Payload};

/// One invalid field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, such as `retry.max_attempts` or `after[2]`.
    pub field: String,
    /// The problem and the allowed values.
    pub problem: String,
}

/// All invalid fields, found in one pass. Collects them while a specification is read; [`Violations::into_result`] ends
/// the pass.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    /// Records that `field` is invalid.
    pub fn add(&mut self, field: impl Into<String>, problem: impl Into<String>) {
        // A request can have a million invalid fields; a few are enough.
        const MAX: usize = 64;
        if self.0.len() < MAX {
            self.0.push(Violation { field: field.into(), problem: problem.into() });
        }
    }

    /// Adds other violations.
    pub fn extend(&mut self, others: Self) {
        others.0.into_iter().for_each(|Violation { field, problem }| self.add(field, problem));
    }

    /// The same violations, of fields that are inside of `message`.
    #[must_use]
    pub fn inside(self, message: &str) -> Self {
        let inside = |violation: Violation| Violation { field: format!("{message}.{}", violation.field), ..violation };
        Self(self.0.into_iter().map(inside).collect())
    }

    /// Returns `value` if there are no violations.
    ///
    /// # Errors
    /// The violations, otherwise.
    pub fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// Parses a name. For an invalid one it returns a placeholder, which [`Violations::into_result`] keeps from being
    /// used.
    pub fn name(&mut self, field: &str, value: &str) -> Name {
        Name::parse(value).unwrap_or_else(|error| {
            self.add(field, if value.is_empty() { format!("is missing; {}", Name::RULE) } else { error.to_string() });
            Name::placeholder()
        })
    }

    /// Parses names, each of which may occur once.
    pub fn names(&mut self, field: &str, values: &[String]) -> Vec<Name> {
        let mut names = Vec::with_capacity(values.len());
        let mut seen = HashSet::with_capacity(values.len());
        for (i, value) in values.iter().enumerate() {
            // The path is made only for a violation, since lists may be long.
            let name = Name::parse(value).unwrap_or_else(|_| self.name(&format!("{field}[{i}]"), value));
            if !seen.insert(value) {
                self.add(format!("{field}[{i}]"), format!("contains {name} twice; list it once"));
            }
            names.push(name);
        }
        names
    }

    /// Parses the names of a subset, at most `max`; no names mean all, which is `None`.
    pub(super) fn subset(&mut self, field: &str, values: &[String], max: usize) -> Option<Arc<[Name]>> {
        if values.len() > max {
            self.add(field, format!("are {}; the limit is {max}", values.len()));
        }
        let names = self.names(field, values);
        (!names.is_empty()).then(|| names.into())
    }

    /// Checks that a duration is in a range.
    pub fn duration(
        &mut self,
        field: &str,
        value: Option<SignedDuration>,
        default: Duration,
        allowed: RangeInclusive<Duration>,
    ) -> Duration {
        let Some(value) = value else { return default };
        match Duration::try_from(value) {
            Ok(duration) if allowed.contains(&duration) => duration,
            _ => {
                let (low, high) = (short(*allowed.start()), short(*allowed.end()));
                self.add(field, format!("is {value:#}; allowed is {low} to {high}"));
                default
            }
        }
    }

    /// Checks that a duration is shorter than `limit`, whose name is `of`.
    pub(super) fn duration_below(
        &mut self,
        field: &str,
        value: Option<SignedDuration>,
        limit: Duration,
        of: &str,
    ) -> Duration {
        let Some(value) = value else { return Duration::ZERO };
        match Duration::try_from(value) {
            Ok(duration) if duration < limit => duration,
            _ => {
                self.add(field, format!("is {value:#}; give less than {}, {of}, and no less than 0s", short(limit)));
                Duration::ZERO
            }
        }
    }

    pub(super) fn number<T: PartialOrd + fmt::Display + Copy>(
        &mut self,
        field: &str,
        value: Option<T>,
        default: T,
        allowed: RangeInclusive<T>,
    ) -> T {
        match value {
            None => default,
            Some(value) if allowed.contains(&value) => value,
            Some(value) => {
                self.add(field, format!("is {value}; allowed is {} to {}", allowed.start(), allowed.end()));
                default
            }
        }
    }

    /// Parses a payload of at most `max_bytes`.
    pub(super) fn payload(&mut self, field: &str, value: &Payload, max_bytes: usize) -> Payload {
        if value.len() > max_bytes {
            self.add(field, format!("is {} bytes; the limit is {max_bytes} bytes", value.len()));
            return Payload::default();
        }
        value.clone()
    }
}

fn short(duration: Duration) -> String {
    SignedDuration::try_from(duration).map_or_else(|_| format!("{duration:?}"), |d| format!("{d:#}"))
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Violation { field, problem }) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{field} {problem}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_are_shown_in_one_line_with_the_paths_of_their_fields() {
        let mut inner = Violations::default();
        inner.add("max_attempts", "is 0; allowed is 1 to 10");
        let mut all = Violations::default();
        all.add("name", "is missing");
        all.extend(inner.inside("retry"));
        assert_eq!(all.to_string(), "name is missing; retry.max_attempts is 0; allowed is 1 to 10");
    }

    #[test]
    fn of_many_violations_the_first_are_kept() {
        let mut all = Violations::default();
        for i in 0..1_000 {
            all.add(format!("after[{i}]"), "is missing");
        }
        assert_eq!((all.0.len(), all.0[63].field.as_str()), (64, "after[63]"));
    }
}
