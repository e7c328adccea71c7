//! Where tensor bytes live.

pub mod mapped;
