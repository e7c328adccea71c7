//! What several families share.

pub mod decoder;
pub mod encoder;
pub mod experts;
pub mod gemma;
pub mod llama;
pub mod net;
pub mod pooling;
pub mod rope;
