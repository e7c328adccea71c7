//! Rows of a table looked up by id.

use crate::attrs::op_struct;
use crate::eval::{from_f64, to_f64, to_i64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate, shape_bytes};
use crate::ops::cast::to_dtype;
use crate::ops::gather::{Gather, checked_indices};
use rlx_tensor::{DType, DTypeClass, Dim, Shape, Tensor};

op_struct! {
    /// Row `ids[i]` of a table, as F32.
    ///
    /// Operands: `ids [..]` I32 or I64, each in `0 .. vocab`; `table [vocab, width]` of any float or block-quantised dtype. Result `[.., width]` F32.
    pub struct Embedding = "embedding" {}
}

impl OpDef for Embedding {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(2, inputs)?;
        InferError::index(inputs, 0)?;
        InferError::rank(inputs, 1, 2)?;
        InferError::weight(inputs, 1)?;
        let dims = [inputs[0].dims(), &inputs[1].dims()[1..]].concat();
        Ok(vec![Shape::from_dims(dims, DType::F32)])
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (vocab, width) = (inputs[1].dims()[0], inputs[1].dims()[1]);
        let table = to_f64(inputs[1])?;
        let mut rows = Vec::new();
        for id in checked_indices(&to_i64(inputs[0])?, vocab, 0)? {
            rows.extend_from_slice(&table[id * width..(id + 1) * width]);
        }
        Ok(vec![from_f64(&[inputs[0].dims(), &[width]].concat(), DType::F32, &rows)?])
    }

    fn props(&self) -> Props {
        Props { composite: true, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let rows = shape_bytes(&outputs[0].with_dtype(inputs[1].dtype()));
        Cost { flops: Dim::Known(0), bytes: shape_bytes(inputs[0]) + rows + shape_bytes(outputs[0]) }
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        // Rows of blocks cannot be taken apart as elements are.
        let table = match graph.shape(inputs[1]).dtype().class() {
            DTypeClass::Quant => to_dtype(graph, inputs[1], DType::F32),
            _ => Ok(inputs[1]),
        };
        let rows = table.and_then(|table| graph.add_one(Gather { axis: 0 }, &[table, inputs[0]]));
        Some(rows.and_then(|rows| to_dtype(graph, rows, DType::F32)).map(|rows| vec![rows]))
    }
}
