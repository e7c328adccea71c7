//! The op list: one line an op. The enum, the names and the parser derive from it.

use crate::attrs::{AttrError, AttrValue};
use crate::op::{OpAttrs, OpDef};
use rlx_tensor::{Dim, Symbol};
use std::sync::Arc;

pub mod activation;
pub mod attention;
pub mod binary;
pub mod broadcast;
pub mod cast;
pub mod concat;
pub mod conv;
pub mod conv_transpose;
pub mod cumsum;
pub mod embedding;
pub mod fused_elementwise;
pub mod gated;
pub mod gather;
pub mod integer_conv;
pub mod integer_linear;
pub mod iota;
pub mod l2_normalize;
pub mod layer_norm;
pub mod linear;
pub mod lora_linear;
pub mod matmul;
pub mod moe;
pub mod pad;
pub mod pool;
pub mod pool_window;
pub mod reduce;
pub mod reshape;
pub mod rms_norm;
pub mod rope;
pub mod rope_angles;
pub mod select;
pub mod slice;
pub mod softmax;
pub mod topk;
pub mod transpose;
pub mod unary;

macro_rules! op_list {
    ($($module:ident :: $name:ident,)*) => {
        /// An op with its attributes.
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub enum Op {
            $(#[doc = concat!("See [`", stringify!($module), "::", stringify!($name), "`].")]
            $name($module::$name),)*
            /// An op defined outside this crate.
            Custom(Arc<dyn OpDef>),
        }

        impl Op {
            /// The text names of all built-in ops.
            pub const NAMES: &'static [&'static str] = &[$(<$module::$name as OpAttrs>::NAME,)*];

            /// What the op means.
            pub fn def(&self) -> &dyn OpDef {
                match self {
                    $(Op::$name(op) => op,)*
                    Op::Custom(op) => op.as_ref(),
                }
            }

            /// A built-in op from its text name and attributes; `None` if no built-in op has this name.
            pub fn from_text(name: &str, attrs: &[(String, AttrValue)]) -> Option<Result<Op, AttrError>> {
                $(if name == <$module::$name as OpAttrs>::NAME {
                    return Some(<$module::$name as OpAttrs>::from_attrs(attrs).map(Op::$name));
                })*
                None
            }
        }

        $(impl From<$module::$name> for Op {
            fn from(op: $module::$name) -> Op {
                Op::$name(op)
            }
        })*
    };
}

op_list! {
    unary::Unary,
    binary::Binary,
    cast::Cast,
    matmul::MatMul,
    reduce::Reduce,
    concat::Concat,
    activation::Activation,
    reshape::Reshape,
    linear::Linear,
    lora_linear::LoraLinear,
    rms_norm::RmsNorm,
    layer_norm::LayerNorm,
    l2_normalize::L2Normalize,
    softmax::Softmax,
    embedding::Embedding,
    gated::Gated,
    rope_angles::RopeAngles,
    rope::Rope,
    attention::Attention,
    moe::Moe,
    pool::Pool,
    conv::Conv,
    conv_transpose::ConvTranspose,
    pool_window::PoolWindow,
    gather::Gather,
    transpose::Transpose,
    broadcast::Broadcast,
    slice::Slice,
    pad::Pad,
    select::Select,
    topk::TopK,
    iota::Iota,
    cumsum::CumSum,
    integer_linear::IntegerLinear,
    integer_conv::IntegerConv,
    fused_elementwise::FusedElementwise,
}

impl Op {
    /// The op as a concrete type.
    pub fn downcast<T: OpDef>(&self) -> Option<&T> {
        self.def().as_any().downcast_ref()
    }

    /// The op with the symbols in its attributes replaced.
    #[must_use]
    pub fn bind_dims(&self, replace: &dyn Fn(&Symbol) -> Option<Dim>) -> Op {
        let def = self.def();
        if let Op::Custom(_) = self {
            return def.with_dims(replace).map_or_else(|| self.clone(), Op::Custom);
        }
        let mut changed = false;
        let mut attrs: Vec<(String, AttrValue)> = Vec::new();
        for (name, value) in def.attrs() {
            let value = match value {
                AttrValue::Dims(dims) => {
                    changed = true;
                    AttrValue::Dims(dims.iter().map(|d| d.substitute(replace)).collect())
                }
                other => other,
            };
            attrs.push((name.to_owned(), value));
        }
        match changed.then(|| Op::from_text(def.name(), &attrs)) {
            Some(Some(Ok(op))) => op,
            _ => self.clone(),
        }
    }
}

impl PartialEq for Op {
    fn eq(&self, other: &Op) -> bool {
        self.def().name() == other.def().name() && self.def().attrs() == other.def().attrs()
    }
}

#[cfg(test)]
mod tests;
