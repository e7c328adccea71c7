//! Steps of a schedule: each binds a kernel family to operands.

pub mod embedding;
pub mod linear;
pub mod solo;
