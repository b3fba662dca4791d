//! Nesting: an orchestrator is a subsystem of another one, its parent, and a cycle of the parent starts one here.

use std::{fmt, sync::Arc};

use super::{CycleId, CycleRequest, Epoch, Name, Payload, Subsystem, Violations};

/// Most characters of the id of an orchestrator.
const MAX_ID: usize = 128;

/// True if a text may be the id of an orchestrator: 1 to 128 letters, digits and signs, without spaces.
#[must_use]
pub fn is_orchestrator_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len()) && text.chars().all(|c| c.is_ascii_graphic())
}

/// The cycle of a parent that started a cycle here. Shown as `ORCHESTRATOR/SUBSYSTEM/EPOCH/CYCLE`, which is the
/// `request_id` of the cycle that it started: so a repeated call finds that cycle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentCycle {
    /// The id of the parent, by the rule of [`is_orchestrator_id`].
    pub orchestrator_id: Arc<str>,
    /// The name under which this orchestrator is registered there.
    pub subsystem: Name,
    /// The term of the parent.
    pub epoch: Epoch,
    /// The cycle of the parent.
    pub cycle_id: CycleId,
}

impl ParentCycle {
    /// Parses the form in which it is shown, and no other one. So a text that this accepts has at most 234 bytes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // The id may contain slashes; the other parts contain none.
        let mut parts = text.rsplitn(4, '/');
        let mut number = || parts.next()?.parse().ok();
        let (cycle_id, epoch) = (CycleId(number()?), Epoch(number()?));
        let subsystem = Name::parse(parts.next()?).ok()?;
        let orchestrator_id = parts.next().filter(|id| is_orchestrator_id(id))?.into();
        let parent = Self { orchestrator_id, subsystem, epoch, cycle_id };
        // A number may have zeros in front of it.
        (parent.to_string() == text).then_some(parent)
    }
}

impl fmt::Display for ParentCycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { orchestrator_id, subsystem, epoch, cycle_id } = self;
        write!(f, "{orchestrator_id}/{subsystem}/{epoch}/{cycle_id}")
    }
}

/// The orchestrators through which a call has come: their ids, the outermost one first, with a space between two. At
/// most [`CallPath::MAX`] of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPath(Arc<str>);

/// Why an orchestrator refuses a call for its path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The text is not a path.
    #[error("orchestrator-path is not a list of at most {max} ids with one space between two", max = CallPath::MAX)]
    Malformed,
    /// It leads back to this orchestrator.
    #[error(
        "orchestrators call each other in a ring: {path} {id}; remove one of these registrations, or, if two \
         orchestrators have the same id, change orchestrator_id in the configuration of one"
    )]
    Ring {
        /// The path so far.
        path: CallPath,
        /// The id of this orchestrator.
        id: Arc<str>,
    },
    /// It is too long.
    #[error("orchestrators are nested too deep: {0} and this one are more than {max}", max = CallPath::MAX)]
    TooDeep(CallPath),
}

impl CallPath {
    /// Most orchestrators in a path.
    pub const MAX: usize = 8;

    /// The path of calls by the orchestrator with this id that no other one has caused.
    #[must_use]
    pub fn from(orchestrator_id: &str) -> Self {
        Self(orchestrator_id.into())
    }

    /// Parses the form in which it is sent.
    ///
    /// # Errors
    /// It has another form, or is too long.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let is_path = text.split(' ').count() <= Self::MAX && text.split(' ').all(is_orchestrator_id);
        if is_path { Ok(Self(text.into())) } else { Err(PathError::Malformed) }
    }

    /// The path of calls that the orchestrator `id` makes because of a call with this path.
    ///
    /// # Errors
    /// It would be a ring, or too long.
    pub fn through(&self, id: &Arc<str>) -> Result<Self, PathError> {
        if self.0.split(' ').any(|other| other == &**id) {
            return Err(PathError::Ring { path: self.clone(), id: id.clone() });
        }
        if self.0.split(' ').count() >= Self::MAX {
            return Err(PathError::TooDeep(self.clone()));
        }
        Ok(Self(format!("{} {id}", self.0).into()))
    }

    /// As it is sent.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CallPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name under which this orchestrator is served as a subsystem, before validation.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "each field is that of `Served`, before validation")]
pub struct ServedSpec {
    pub name: String,
    pub subsystems: Vec<String>,
    pub parameters: Payload,
}

/// A name under which this orchestrator is served as a subsystem: a parent's cycle with it is one cycle here.
#[derive(Clone, Debug, PartialEq)]
pub struct Served {
    /// Unique name, under which the parent registers this orchestrator.
    pub name: Name,
    /// The subsystems of its cycles, at most [`CycleRequest::MAX_SUBSET`]; `None` means all.
    pub subset: Option<Arc<[Name]>>,
    /// Parameters of its cycles: they take precedence over those of the registrations here, and those of the parent
    /// over them.
    pub parameters: Payload,
}

impl Served {
    /// Most names under which one orchestrator is served.
    pub const MAX: usize = 256;

    /// Validates a name.
    ///
    /// # Errors
    /// All invalid fields together.
    pub fn from_spec(spec: &ServedSpec) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        let subset = bad.subset("subsystems", &spec.subsystems, CycleRequest::MAX_SUBSET);
        let this = Self {
            name: bad.name("name", &spec.name),
            subset,
            parameters: bad.payload("parameters", &spec.parameters, Subsystem::MAX_PARAMETERS),
        };
        bad.into_result(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cycle_of_a_parent_is_parsed_as_it_is_shown() {
        let longest = format!("{}/{}/{max}/{max}", "h".repeat(MAX_ID), "e".repeat(Name::MAX_LEN), max = u64::MAX);
        assert_eq!(longest.len(), 234);
        for text in ["hub/eu/1764374400000/17", "a/b/hub/eu/1/18446744073709551615", &longest] {
            assert_eq!(ParentCycle::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "hub", "hub/eu/1", "/eu/1/2", "hub/e u/1/2", "hub/eu/x/2", "hub/eu/1/-2", "h b/eu/1/2"] {
            assert_eq!(ParentCycle::parse(text), None, "{text}");
        }
        for text in ["hub/eu/1/02", "hub/eu/+1/2"] {
            assert_eq!(ParentCycle::parse(text), None, "{text} is shown in another form");
        }
    }

    #[test]
    fn a_path_grows_until_it_is_a_ring_or_too_long() {
        let id = |text: &str| Arc::<str>::from(text);
        let path = CallPath::from("hub").through(&id("eu")).unwrap();
        assert_eq!((path.as_str(), CallPath::parse("hub eu").unwrap()), ("hub eu", path.clone()));
        assert_eq!(path.through(&id("hub")).unwrap_err(), PathError::Ring { path: path.clone(), id: id("hub") });
        // Another id that begins alike.
        let mut path = path.through(&id("hu")).unwrap();
        for number in 3..CallPath::MAX {
            path = path.through(&id(&number.to_string())).unwrap();
        }
        assert_eq!(path.through(&id("one-more")).unwrap_err(), PathError::TooDeep(path.clone()));
        assert!(CallPath::parse(path.as_str()).is_ok());
        for text in ["", " ", "hub  eu", " hub", "hub ", "hub\teu", "h\u{fc}b", &format!("{path} one-more")] {
            assert_eq!(CallPath::parse(text), Err(PathError::Malformed), "{text}");
        }
    }
}
