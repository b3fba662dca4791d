//! Who calls, and what each caller may do: identities, their credentials, and grants; and where the service itself may
//! connect. Pure: it reads no file and no clock, and knows no RPC.
//!
//! A caller presents a [`Credential`]. [`Policy::authenticate`] returns its [`Identity`](crate::model::Identity), and
//! [`Policy::rights`] the [`Rights`] that the grants give to it. A [`Role`] says which RPCs a grant is for
//! (`api/rules.rs`); the other keys of the grant limit their targets.

mod certificate;
mod grant;
mod jwt;
mod limits;
mod pattern;
mod policy;
mod reach;
mod rights;
mod session;
mod token;

pub use self::{
    certificate::{NoIdentity, identity_of, key_of},
    grant::{Grant, GrantSpec, Role},
    jwt::{Claims, Issuer, Jwt, JwtError},
    limits::CallerLimits,
    policy::{Authenticated, Credential, Mode, Policy, Presented, Revoked, Unauthenticated},
    reach::{Allowed, Reach},
    rights::{Registering, Right, Rights, Targets},
    session::{NoSession, Session, SessionToken, Sessions},
    token::{Bearer, Digest, NoRandomness, Token, TokenId, TokenSpec},
};
