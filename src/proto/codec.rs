//! The codec of the contract's messages on gRPC streams: like `tonic_prost`, but a server checks a request before it
//! builds it, and reports a malformed request as the client's error.

use std::{collections::HashMap, marker::PhantomData};

use bytes::Buf;
use prost::{Message, Name};
use tonic::{
    Code, Status,
    codec::{self, DecodeBuf, Decoder},
};
use tonic_prost::{ProstDecoder, ProstEncoder};
use tonic_types::{ErrorDetails, StatusExt};

use super::bounds::{self, Unreadable};

/// Decodes `U` and encodes `T`. The generated services use it (see `build.rs`).
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Checked<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Checked(ProstDecoder::default())
    }
}

/// Decodes a message. A request is checked first; an answer comes from a service that the client has chosen.
pub struct Checked<U>(ProstDecoder<U>);

impl<U: Message + Name + Default> Decoder for Checked<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let name = U::full_name();
        if !bounds::is_request(&name) {
            return self.0.decode(buf);
        }
        // The library passes a message in one piece.
        bounds::check(&name, buf.chunk()).map_err(|unreadable| refused(U::PACKAGE, unreadable))?;
        U::decode(buf).map(Some).map_err(|error| refused(U::PACKAGE, Unreadable::malformed(&name, error)))
    }
}

/// Adds the error details of the orchestrator's contract; the contract of subsystems has plain codes.
fn refused(package: &str, unreadable: Unreadable) -> Status {
    let message = unreadable.to_string();
    if package != "dreamnet.orchestrator.v1" {
        return Status::invalid_argument(message);
    }
    let mut details = ErrorDetails::with_error_info("INVALID_FIELDS", "orchestrator.dreamnet", HashMap::new());
    if let Unreadable::TooManyEntries { field, .. } = unreadable {
        details.add_bad_request_violation(field, message.clone());
    }
    Status::with_error_details(Code::InvalidArgument, message, details)
}
