//! The op list: one line an op. The enum, the names and the parser derive from it.

use crate::attrs::{AttrError, AttrValue};
use crate::op::{OpAttrs, OpDef};
use std::sync::Arc;

pub mod activation;
pub mod binary;
pub mod cast;
pub mod concat;
pub mod linear;
pub mod matmul;
pub mod reduce;
pub mod reshape;
pub mod rms_norm;
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
    rms_norm::RmsNorm,
}

impl Op {
    /// The op as a concrete type.
    pub fn downcast<T: OpDef>(&self) -> Option<&T> {
        self.def().as_any().downcast_ref()
    }
}

impl PartialEq for Op {
    fn eq(&self, other: &Op) -> bool {
        self.def().name() == other.def().name() && self.def().attrs() == other.def().attrs()
    }
}
