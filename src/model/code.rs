//! The gRPC status codes, by their names.

use std::fmt;

macro_rules! codes {
    ($($variant:ident = $number:literal $name:literal,)+) => {
        /// A gRPC status code, as <https://grpc.io/docs/guides/status-codes/> defines them.
        #[allow(missing_docs, reason = "the gRPC documentation defines them")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $($variant = $number,)+ }

        impl Code {
            /// Its name, such as `DEADLINE_EXCEEDED`.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The code of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }

            /// The code of that number; [`Code::Unknown`] for one that gRPC does not define.
            #[must_use]
            pub fn from_number(number: i32) -> Self {
                match number { $($number => Self::$variant,)+ _ => Self::Unknown }
            }
        }
    };
}

codes! {
    Ok = 0 "OK",
    Cancelled = 1 "CANCELLED",
    Unknown = 2 "UNKNOWN",
    InvalidArgument = 3 "INVALID_ARGUMENT",
    DeadlineExceeded = 4 "DEADLINE_EXCEEDED",
    NotFound = 5 "NOT_FOUND",
    AlreadyExists = 6 "ALREADY_EXISTS",
    PermissionDenied = 7 "PERMISSION_DENIED",
    ResourceExhausted = 8 "RESOURCE_EXHAUSTED",
    FailedPrecondition = 9 "FAILED_PRECONDITION",
    Aborted = 10 "ABORTED",
    OutOfRange = 11 "OUT_OF_RANGE",
    Unimplemented = 12 "UNIMPLEMENTED",
    Internal = 13 "INTERNAL",
    Unavailable = 14 "UNAVAILABLE",
    DataLoss = 15 "DATA_LOSS",
    Unauthenticated = 16 "UNAUTHENTICATED",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
