//! Steps of a schedule: each binds a kernel family to operands.

pub mod attention;
pub mod conv;
pub mod copy;
pub mod elementwise;
pub mod embedding;
pub mod gather;
pub mod integer_product;
pub mod linear;
pub mod lora;
pub mod matmul;
pub mod moe;
pub mod norm;
pub mod reduce;
pub mod rope;
pub mod softmax;
pub mod solo;
pub mod view;
mod walk;

pub use walk::MAX_RANK;
