//! Where low-rank adapters may attach to a graph, and how an adapter's factors lie in memory.

use crate::graph::{Graph, GraphError, Source};
use crate::ids::ValueId;
use crate::ops::linear::Linear;
use rlx_tensor::{DType, Dim, Shape, Symbol};
use std::collections::{BTreeMap, BTreeSet};

/// The input that holds each adapter's scale at each site: `[slots, sites]` F32, 0 where it leaves the site alone.
pub const SCALES: &str = "adapter_scales";

/// The input that holds the adapter of each row of values of `rows` rows: I32, -1 for none.
pub fn slots_input(rows: &Symbol) -> String {
    format!("adapter_slots.{}", rows.name())
}

/// The input that holds the factors of adapter `slot`: `[rank, width]`.
pub fn factors_input(slot: usize) -> String {
    format!("adapter.{slot}")
}

/// The symbol of an adapter's rank.
pub fn rank_symbol(slot: usize) -> Symbol {
    Symbol::new(format!("adapter_rank_{slot}"))
}

/// A weight that adapters may update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSite {
    /// Column of the scales.
    pub index: usize,
    /// First column of the factors: `k` of A, then `n` of B transposed.
    pub column: usize,
    /// Inputs of the layer.
    pub k: usize,
    /// Outputs of the layer.
    pub n: usize,
    /// The weight is stored `[k, n]`.
    pub transposed: bool,
}

/// Which weights of a graph adapters may update: those of its linear layers. An adapter is one matrix `[rank, width]`, in which
/// every weight has its columns.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterLayout {
    sites: BTreeMap<String, AdapterSite>,
    rows: BTreeSet<Symbol>,
    width: usize,
    /// Adapters of a run at most.
    pub slots: usize,
    /// Dtype of the factors: F32 or BF16.
    pub dtype: DType,
}

impl AdapterLayout {
    /// The layout for a graph as built: before any pass.
    pub fn of(graph: &Graph, slots: usize, dtype: DType) -> Self {
        let mut layout = Self { sites: BTreeMap::new(), rows: BTreeSet::new(), width: 0, slots, dtype };
        for (_, node) in graph.nodes() {
            let Some(linear) = node.op.downcast::<Linear>().filter(|l| l.parts == 1) else { continue };
            let weight = graph.value(node.inputs[1]);
            let (Some(name), Source::Param) = (&weight.name, &weight.source) else { continue };
            let (Some(dims), Some(rows)) = (weight.shape.known_dims(), rows_of(graph.shape(node.inputs[0])))
            else {
                continue;
            };
            layout.rows.insert(rows);
            let (n, k) = if linear.transposed { (dims[1], dims[0]) } else { (dims[0], dims[1]) };
            if layout.sites.contains_key(name) {
                continue;
            }
            let (index, column) = (layout.sites.len(), layout.width);
            let site = AdapterSite { index, column, k, n, transposed: linear.transposed };
            layout.sites.insert(name.clone(), site);
            layout.width += k + n;
        }
        layout
    }

    /// The weights by name.
    pub fn sites(&self) -> &BTreeMap<String, AdapterSite> {
        &self.sites
    }

    /// Columns of an adapter.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Symbols of the numbers of rows that layers run on.
    pub fn rows(&self) -> &BTreeSet<Symbol> {
        &self.rows
    }

    /// The graph with the inputs that adapters come in by.
    ///
    /// # Errors
    /// [`GraphError`] if the graph has values of these names.
    pub fn with_inputs(&self, graph: &Graph) -> Result<Graph, GraphError> {
        let mut graph = graph.clone();
        for rows in &self.rows {
            graph.input(&slots_input(rows), Shape::from_dims(vec![Dim::symbol(rows.name())], DType::I32))?;
        }
        graph.input(SCALES, Shape::new(&[self.slots, self.sites.len()], DType::F32))?;
        for slot in 0..self.slots {
            let dims = vec![Dim::symbol(rank_symbol(slot).name()), Dim::Known(self.width)];
            graph.input(&factors_input(slot), Shape::from_dims(dims, self.dtype))?;
        }
        Ok(graph)
    }
}

/// The symbol that a matrix has rows of, if it is a matrix of as many rows as one symbol says.
pub(crate) fn rows_of(shape: &Shape) -> Option<Symbol> {
    let [rows, _] = shape.dims() else { return None };
    rows.as_symbol_plus().filter(|(_, offset)| *offset == 0).map(|(symbol, _)| symbol.clone())
}

/// The value of an interface name among some values.
pub(crate) fn named<'v>(mut values: impl Iterator<Item = (ValueId, &'v str)>, name: &str) -> Option<ValueId> {
    values.find(|(_, found)| *found == name).map(|(id, _)| id)
}
