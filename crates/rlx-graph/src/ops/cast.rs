//! Conversion between dtypes.

use crate::attrs::op_struct;
use crate::eval::{from_f64, from_i64, to_f64, to_i64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use rlx_tensor::{DType, DTypeClass, Shape, Tensor};

op_struct! {
    /// Elements as another dtype: floats round to nearest even; float to integer truncates and saturates; integers wrap. Quantised blocks
    /// become floats.
    pub struct Cast = "cast" {
        /// The dtype of the result.
        to: DType,
    }
}

/// The value itself if it has this dtype, else a cast of it.
pub fn to_dtype(graph: &mut Graph, value: ValueId, to: DType) -> Result<ValueId, GraphError> {
    if graph.shape(value).dtype() == to { Ok(value) } else { graph.add_one(Cast { to }, &[value]) }
}

impl OpDef for Cast {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let decodes = inputs[0].dtype().class() == DTypeClass::Quant && self.to.is_float();
        for found in [inputs[0].dtype(), self.to] {
            let plain = !matches!(found.class(), DTypeClass::Quant | DTypeClass::Complex);
            let decoded = decodes && found.class() == DTypeClass::Quant;
            if !(plain || decoded) {
                return Err(InferError::DType { operand: 0, expected: "a plain number type".into(), found });
            }
        }
        Ok(vec![inputs[0].with_dtype(self.to)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let x = inputs[0];
        let both_whole = !x.dtype().is_float() && !self.to.is_float();
        Ok(vec![match both_whole {
            true => from_i64(x.dims(), self.to, &to_i64(x)?)?,
            false => from_f64(x.dims(), self.to, &to_f64(x)?)?,
        }])
    }

    fn props(&self) -> Props {
        Props { elementwise: true, ..Props::default() }
    }
}
