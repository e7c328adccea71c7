//! Assigning values to buffers: views, in-place results, outputs written straight to the caller.

use super::joins::Joins;
use super::places::{Buffer, BufferId, BufferKind, Place};
use super::template::{PlanError, PlanTarget};
use rlx_graph::op::shape_bytes;
use rlx_graph::{Graph, NodeId, Source, ValueId};
use rlx_tensor::{Shape, SizeId, SizeTable};

/// The state of placing a graph's values in execution order.
pub(super) struct Placer<'g> {
    pub graph: &'g Graph,
    pub target: &'g dyn PlanTarget,
    pub sizes: &'g mut SizeTable,
    pub buffers: Vec<Buffer>,
    pub places: Vec<Option<Place>>,
    /// Last node that uses each value itself (not its views); `usize::MAX` for graph outputs.
    pub last_use: Vec<usize>,
    /// Whether every user of a value takes rows that are not adjacent.
    pub strided_ok: Vec<bool>,
    /// For each buffer, the last node that uses a value placed in it.
    pub buffer_last: Vec<usize>,
    /// Values that are written where a join wants them.
    joins: Joins,
}

impl<'g> Placer<'g> {
    pub fn new(graph: &'g Graph, target: &'g dyn PlanTarget, sizes: &'g mut SizeTable) -> Self {
        let count = graph.values().len();
        let (mut last_use, mut strided_ok) = (vec![0; count], vec![true; count]);
        for (id, node) in graph.nodes() {
            for (operand, value) in node.inputs.iter().enumerate() {
                last_use[value.index()] = id.index();
                strided_ok[value.index()] &= target.accepts_strided(&node.op, operand);
            }
        }
        for (_, value) in graph.outputs() {
            last_use[value.index()] = usize::MAX;
            strided_ok[value.index()] = false;
        }
        let (buffers, places, buffer_last) = (Vec::new(), vec![None; count], Vec::new());
        let joins = Joins::find(graph, target, &strided_ok);
        Self { graph, target, sizes, buffers, places, last_use, strided_ok, buffer_last, joins }
    }

    pub fn place(&self, value: ValueId) -> Result<&Place, PlanError> {
        self.places[value.index()].as_ref().ok_or(PlanError::Unplaced { value })
    }

    pub fn dims(&mut self, shape: &Shape) -> Result<Vec<SizeId>, PlanError> {
        shape.dims().iter().map(|d| self.sizes.intern(d).map_err(PlanError::from)).collect()
    }

    /// A new buffer that holds exactly this value.
    pub fn new_buffer(&mut self, value: ValueId, kind: BufferKind, at: usize) -> Result<(), PlanError> {
        let shape = self.graph.shape(value).clone();
        let bytes = self.sizes.intern(&shape_bytes(&shape))?;
        let buffer = BufferId::from_index(self.buffers.len());
        self.buffers.push(Buffer { kind, bytes, first: at, last: at });
        self.buffer_last.push(self.last_use[value.index()]);
        let dims = self.dims(&shape)?;
        let place = Place { buffer, offset: 0, stride: None, dims, dtype: shape.dtype() };
        self.places[value.index()] = Some(place);
        Ok(())
    }

    /// Puts a value at a place in an existing buffer, which then lives at least as long as the value.
    fn share(&mut self, value: ValueId, place: Place) {
        let last = self.last_use[value.index()];
        let known = &mut self.buffer_last[place.buffer.index()];
        *known = (*known).max(last);
        self.places[value.index()] = Some(place);
    }

    /// Gives inputs, params, states and constants their buffers.
    pub fn place_sources(&mut self) -> Result<(), PlanError> {
        let (mut inputs, mut params, mut states) =
            (Counter::default(), Counter::default(), Counter::default());
        for (id, value) in self.graph.values() {
            let kind = match &value.source {
                Source::Input => BufferKind::Input(inputs.next()),
                Source::Param => BufferKind::Param(params.next()),
                Source::State => BufferKind::State(states.next()),
                Source::Const(tensor) => BufferKind::Const(tensor.clone()),
                _ => continue,
            };
            self.new_buffer(id, kind, 0)?;
        }
        Ok(())
    }

    /// Tries to make a node's result a view of its operand; true if it is one, so that no step is needed.
    pub fn place_view(&mut self, id: NodeId) -> Result<bool, PlanError> {
        let node = self.graph.node(id);
        let (&[operand, ..], &[result]) = (node.inputs.as_slice(), node.outputs.as_slice()) else {
            return Ok(false);
        };
        if self.is_output(result) {
            return Ok(false);
        }
        let from = self.place(operand)?.clone();
        if node.op.def().props().view && from.stride.is_none() {
            let dims = self.dims(&self.graph.shape(result).clone())?;
            self.share(result, Place { dims, ..from });
            return Ok(true);
        }
        let Some(start) = node.op.def().props().columns.filter(|_| self.strided_ok[result.index()]) else {
            return Ok(false);
        };
        let width = self.graph.shape(operand).last().and_then(|d| d.known());
        let Some(width) = width else { return Ok(false) };
        let dims = self.dims(&self.graph.shape(result).clone())?;
        let stride = Some(from.stride.unwrap_or(width));
        self.share(result, Place { offset: from.offset + start, stride, dims, ..from });
        Ok(true)
    }

    fn is_output(&self, value: ValueId) -> bool {
        self.graph.outputs().iter().any(|(_, v)| *v == value)
    }

    /// Tries to make a join of values that stand where it wants them the whole of their buffer; true if no step is needed.
    pub fn place_join(&mut self, id: NodeId) -> Result<bool, PlanError> {
        let Some((buffer, width)) = self.joins.buffer(id) else { return Ok(false) };
        let node = self.graph.node(id);
        let mut column = 0;
        for &operand in &node.inputs {
            let place = self.place(operand)?;
            if (place.buffer, place.offset, place.stride) != (buffer, column, Some(width)) {
                return Ok(false);
            }
            column += self.graph.shape(operand).last().and_then(|d| d.known()).unwrap_or(0);
        }
        let result = node.outputs[0];
        let shape = self.graph.shape(result).clone();
        let place = Place { buffer, offset: 0, stride: None, dims: self.dims(&shape)?, dtype: shape.dtype() };
        self.share(result, place);
        Ok(true)
    }

    /// Places a value in the buffer of the join it is written into; false if there is none.
    fn place_part(&mut self, value: ValueId, at: usize) -> Result<bool, PlanError> {
        let Some((join, column, width)) = self.joins.part(value) else { return Ok(false) };
        let buffer = match self.joins.buffer(join) {
            Some((buffer, _)) => buffer,
            None => {
                let joined = self.graph.node(join).outputs[0];
                let bytes = self.sizes.intern(&shape_bytes(self.graph.shape(joined)))?;
                let buffer = BufferId::from_index(self.buffers.len());
                self.buffers.push(Buffer { kind: BufferKind::Arena, bytes, first: at, last: at });
                self.buffer_last.push(self.last_use[joined.index()]);
                self.joins.start(join, buffer);
                buffer
            }
        };
        let shape = self.graph.shape(value).clone();
        let dims = self.dims(&shape)?;
        self.share(value, Place { buffer, offset: column, stride: Some(width), dims, dtype: shape.dtype() });
        Ok(true)
    }

    /// Places the results of the node that becomes step `at`.
    pub fn place_results(&mut self, id: NodeId, at: usize) -> Result<(), PlanError> {
        let node = self.graph.node(id);
        for (index, &result) in node.outputs.iter().enumerate() {
            let output = self.graph.outputs().iter().position(|(_, v)| *v == result);
            if let Some(position) = output {
                self.new_buffer(result, BufferKind::Output(position), at)?;
            } else if self.place_part(result, at)? {
                continue;
            } else if let Some(operand) = (index == 0).then(|| self.in_place_operand(id)).flatten() {
                let place = self.place(operand)?.clone();
                let shape = self.graph.shape(result).clone();
                let dims = self.dims(&shape)?;
                self.share(result, Place { dims, dtype: shape.dtype(), ..place });
            } else {
                self.new_buffer(result, BufferKind::Arena, at)?;
            }
        }
        Ok(())
    }

    /// An operand that dies at this node and whose buffer the first result can take over.
    fn in_place_operand(&self, id: NodeId) -> Option<ValueId> {
        let node = self.graph.node(id);
        let props = node.op.def().props();
        let result = self.graph.shape(node.outputs[0]);
        props.in_place.iter().filter_map(|&i| node.inputs.get(i).copied()).find(|&operand| {
            let Some(place) = &self.places[operand.index()] else { return false };
            let buffer = &self.buffers[place.buffer.index()];
            let same_size = shape_bytes(self.graph.shape(operand)) == shape_bytes(result);
            let others = node.inputs.iter().filter(|&&v| v != operand);
            let mut others = others.filter_map(|v| self.places[v.index()].as_ref());
            matches!(buffer.kind, BufferKind::Arena)
                && place.is_whole()
                && same_size
                && self.buffer_last[place.buffer.index()] <= id.index()
                && buffer.bytes_are(self.sizes, result)
                && !others.any(|p| p.buffer == place.buffer)
                && self.accepts(id, operand, result)
        })
    }

    fn accepts(&self, id: NodeId, operand: ValueId, result: &Shape) -> bool {
        let node = self.graph.node(id);
        let position = node.inputs.iter().position(|&v| v == operand);
        self.target.accepts_in_place(&node.op, position, result)
    }
}

impl Buffer {
    fn bytes_are(&self, sizes: &SizeTable, shape: &Shape) -> bool {
        *sizes.dim(self.bytes) == shape_bytes(shape)
    }
}

/// Hands out positions.
#[derive(Default)]
struct Counter(usize);

impl Counter {
    fn next(&mut self) -> usize {
        self.0 += 1;
        self.0 - 1
    }
}
