//! The op table: one row an op, listed by family. A row lowers a node to a region's graph, evaluates it between regions, or both.

use crate::error::{OnnxError, Refusal};
use crate::lower::{Bound, Host, Lowering, Region};
use crate::model::NodeDef;
use crate::value::Value;
use rlx::weights::WeightRegistry;
use rlx_graph::{ValueId, interpret};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::OnceLock;

mod attention;
pub(crate) mod contrib;
mod control;
mod convolution;
mod dropout;
mod einsum;
mod elementwise;
mod integer;
mod linear;
mod loss;
mod ml;
mod movement;
mod norm;
mod normalisation;
mod pooling;
pub(crate) mod quant;
mod random;
mod recurrent;
mod reduction;
mod resize;
mod sampling;
mod scatter;
mod select;
mod sequence;
mod shape;
mod signal;
mod suppression;
mod text;
mod training;

/// Writes a node into a region's graph; gives its results in order.
pub type LowerFn = fn(&mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal>;
/// Evaluates a node between regions; gives its results in order.
pub type HostFn = fn(&Host<'_>) -> Result<Vec<Value>, Refusal>;

/// One op.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// Its domain; empty for the default one.
    pub domain: &'static str,
    /// Part of a region.
    pub lower: Option<LowerFn>,
    /// Evaluated between regions, where it cannot be part of one.
    pub host: Option<HostFn>,
    /// Another result in every run; never folded.
    pub impure: bool,
    /// With known operands of more bytes it is not folded but lowered.
    pub fold_bytes: usize,
}

/// A node whose operands are all known is folded unless they take more bytes than this.
const FOLD_BYTES: usize = 1 << 20;

impl Row {
    /// An op that becomes part of regions.
    pub const fn lower(name: &'static str, lower: LowerFn) -> Row {
        Row { name, domain: "", lower: Some(lower), host: None, impure: false, fold_bytes: FOLD_BYTES }
    }

    /// An op that is evaluated between regions.
    pub const fn host(name: &'static str, host: HostFn) -> Row {
        Row { name, domain: "", lower: None, host: Some(host), impure: false, fold_bytes: FOLD_BYTES }
    }

    /// An op that becomes part of regions where its operands allow.
    pub const fn both(name: &'static str, lower: LowerFn, host: HostFn) -> Row {
        Row { name, domain: "", lower: Some(lower), host: Some(host), impure: false, fold_bytes: FOLD_BYTES }
    }

    /// The same op in another domain.
    #[must_use]
    pub const fn of(self, domain: &'static str) -> Row {
        Row { domain, ..self }
    }

    /// The same op, folded only where its operands are few: a weight that it makes is no constant of the graph.
    #[must_use]
    pub const fn making_weights(self, fold_bytes: usize) -> Row {
        Row { fold_bytes, ..self }
    }

    /// The same op, never folded.
    #[must_use]
    pub const fn changing(self) -> Row {
        Row { impure: true, ..self }
    }
}

/// The families, each with its rows.
const FAMILIES: &[&[Row]] = &[
    attention::ROWS,
    contrib::ROWS,
    control::ROWS,
    convolution::ROWS,
    dropout::ROWS,
    einsum::ROWS,
    elementwise::ROWS,
    linear::ROWS,
    loss::ROWS,
    ml::ROWS,
    movement::ROWS,
    norm::ROWS,
    normalisation::ROWS,
    pooling::ROWS,
    quant::ROWS,
    random::ROWS,
    recurrent::ROWS,
    reduction::ROWS,
    resize::ROWS,
    sampling::ROWS,
    scatter::ROWS,
    select::ROWS,
    sequence::ROWS,
    shape::ROWS,
    signal::ROWS,
    suppression::ROWS,
    text::ROWS,
    training::ROWS,
];

type Table = HashMap<(&'static str, &'static str), &'static Row>;

fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| FAMILIES.iter().flat_map(|f| f.iter()).map(|r| ((r.domain, r.name), r)).collect())
}

/// The part of a shape that a node `Shape` asks for.
pub(crate) fn shape_bounds(node: &NodeDef, rank: usize) -> Result<(usize, usize), Refusal> {
    Ok(shape::bounds(rank, node.int("start", 0)?, node.int_opt("end")?))
}

/// Every row.
pub fn rows() -> impl Iterator<Item = &'static Row> {
    FAMILIES.iter().flat_map(|f| f.iter())
}

/// Whether there is a row for an op.
pub fn is_known(domain: &str, name: &str) -> bool {
    table().contains_key(&(domain, name))
}

/// The row of a node's op.
///
/// # Errors
/// [`OnnxError::Unsupported`] for an op without one.
pub fn row_of(node: &NodeDef) -> Result<&'static Row, OnnxError> {
    table().get(&(node.domain.as_str(), node.op.as_str())).copied().ok_or_else(|| OnnxError::Unsupported {
        node: node.name.clone(),
        op: node.label(),
        reason: "there is no such op in the table".to_owned(),
    })
}

/// Evaluates a lowering on known operands, in place of the ones a node was given.
pub fn interpret_lowering(
    node: &NodeDef,
    lower: LowerFn,
    operands: Vec<Option<Value>>,
) -> Result<Vec<Value>, Refusal> {
    let inputs = operands.iter().enumerate().map(|(i, v)| v.as_ref().map(|_| i)).collect();
    let node = NodeDef { inputs, ..node.clone() };
    let bound: Vec<Option<Bound>> = operands.into_iter().map(|v| v.map(Bound::Const)).collect();
    let mut region = Region::named("fold", true);
    let values = lower(&mut Lowering {
        node: &node,
        region: &mut region,
        bound: &bound,
        read: &mut BTreeSet::new(),
        weights: &WeightRegistry::new(),
        prefix: "",
        initial: &HashSet::new(),
        avoid_values: false,
    })?;
    let names: Vec<String> = (0..values.len()).map(|i| i.to_string()).collect();
    let outputs: Vec<(&str, ValueId)> = names.iter().map(String::as_str).zip(values).collect();
    region.graph.set_outputs(&outputs)?;
    let results = interpret(&region.graph, &[], &|_| None, &mut BTreeMap::new())?;
    Ok(results.into_iter().map(|(_, tensor)| Value::Tensor(tensor)).collect())
}
