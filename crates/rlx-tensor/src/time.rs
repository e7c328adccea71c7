//! Points in time: the system's clock, or, where a build has none, one that the host gives.

#[cfg(any(target_family = "wasm", test))]
mod host;

#[cfg(not(target_family = "wasm"))]
pub use std::time::Instant;

#[cfg(target_family = "wasm")]
pub use host::{Instant, set_clock};
