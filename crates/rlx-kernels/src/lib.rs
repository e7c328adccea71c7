//! CPU speed: instruction-set dispatch, thread pool and kernel families.
#![expect(
    unsafe_code,
    reason = "kernels work on raw pointers; the crate is one of the named places of unsafe code"
)]
#![expect(
    clippy::needless_range_loop,
    reason = "register tiles are indexed by constant bounds so that they unroll"
)]

pub mod aligned;
pub mod attention;
pub mod cast;
pub mod conv;
pub mod copy;
pub mod elementwise;
pub mod gather;
pub mod gemm;
pub mod integer_product;
pub mod isa;
pub mod limits;
pub mod lora;
pub mod math;
pub mod matmul;
pub mod moe;
pub mod norm;
pub mod pool;
pub mod pooling;
pub mod quant_dot;
pub mod rank;
pub mod reduce;
pub mod rope;
pub mod schedule;
pub mod softmax;
pub mod steps;
