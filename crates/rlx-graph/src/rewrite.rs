//! Rewriting: patterns are values, rules return patches, and only the driver changes a draft.

mod draft;
pub(crate) mod driver;
pub mod pat;
mod patch;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod words;

pub use draft::{BuildError, Draft, DraftNode};
pub use driver::{Fired, FusionReport, Refused, RewriteError, Rule, Tally, rewrite};
pub use pat::{Match, Pattern};
pub use patch::{Operand, Patch};
