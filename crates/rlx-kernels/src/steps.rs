//! Steps of a schedule: each binds a kernel family to operands.

pub mod attention;
pub mod copy;
pub mod embedding;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod softmax;
pub mod solo;
