//! A plan as text, read back to the same plan.
//!
//! ```text
//! lir "tiny" {
//!   symbol rows = 8
//!   size 32*rows = 256
//!   buffer b0 : input 0, 4*rows
//!   buffer b1 : const, 4 = f32[] [0.5]
//!   buffer b2 : arena, 32*rows, steps 0..1, at 64
//!   input "ids" : b0 i32[rows]
//!   check rows = 4*batch in "linear at model.rs:7:9"
//!   step b2 f32[rows, 8] = embedding(b0 i32[rows], b3 f32[100, 8]) {} from "model.rs:3:5"
//!   arena 320
//! }
//! ```
//!
//! `symbol` gives a capacity; `size` an entry of the size table with its value at capacity. A buffer has an owner and bytes; one that
//! belongs to the arena also the first and last step of its life and its offset. Operands are places: the buffer, with `+n` where
//! they start n elements in and `/n` where their rows are n elements apart, then dtype and dims. Attributes, constants and blobs
//! are written as in the text of graphs ([`rlx_graph::text`]).

mod parse;

pub use parse::{parse_lir, parse_lir_with};

use super::lir::Lir;
use super::places::{BufferId, BufferKind, Place};
use super::template::{InterfaceEntry, StepSpec, Template};
use rlx_graph::text::{attrs_text, const_text, quoted, write_blobs};
use rlx_tensor::{Dim, Shape, Tensor};
use std::fmt;

impl fmt::Display for Lir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let template = &**self.template();
        let mut blobs = Vec::new();
        writeln!(f, "lir {} {{", quoted(template.name()))?;
        for symbol in template.sizes.symbols() {
            writeln!(f, "  symbol {symbol} = {}", self.binding().value(symbol).unwrap_or(0))?;
        }
        for (id, value) in template.sizes.ids().zip(self.capacities()) {
            writeln!(f, "  size {} = {value}", template.sizes.dim(id))?;
        }
        for index in 0..template.buffers.len() {
            self.write_buffer(f, BufferId::from_index(index), &mut blobs)?;
        }
        for (kind, entries) in interface(template) {
            for entry in entries {
                let place = place_text(template, &entry.place);
                writeln!(f, "  {kind} {} : {place}", quoted(&entry.name))?;
            }
        }
        for check in &template.checks {
            let (left, right) = (template.sizes.dim(check.left), template.sizes.dim(check.right));
            writeln!(f, "  check {left} = {right} in {}", quoted(&check.node))?;
        }
        for step in &template.steps {
            writeln!(f, "  step {}", step_text(template, step))?;
        }
        writeln!(f, "  arena {}", self.arena_bytes())?;
        writeln!(f, "}}")?;
        write_blobs(f, &blobs)
    }
}

/// The lists of the interface with the words that stand before their entries.
fn interface(template: &Template) -> [(&'static str, &[InterfaceEntry]); 4] {
    [
        ("input", template.inputs()),
        ("param", template.params()),
        ("state", template.states()),
        ("output", template.outputs()),
    ]
}

impl Lir {
    fn write_buffer<'l>(
        &'l self,
        f: &mut fmt::Formatter<'_>,
        id: BufferId,
        blobs: &mut Vec<&'l Tensor>,
    ) -> fmt::Result {
        let buffer = &self.template().buffers[id.index()];
        let bytes = self.template().sizes.dim(buffer.bytes);
        write!(f, "  buffer {id} : ")?;
        match &buffer.kind {
            BufferKind::Arena => {
                let at = self.offset(id).unwrap_or(0);
                writeln!(f, "arena, {bytes}, steps {}..{}, at {at}", buffer.first, buffer.last)
            }
            BufferKind::Input(i) => writeln!(f, "input {i}, {bytes}"),
            BufferKind::Output(i) => writeln!(f, "output {i}, {bytes}"),
            BufferKind::State(i) => writeln!(f, "state {i}, {bytes}"),
            BufferKind::Param(i) => writeln!(f, "param {i}, {bytes}"),
            BufferKind::Const(tensor) => {
                let shape = Shape::new(tensor.dims(), tensor.dtype());
                writeln!(f, "const, {bytes} = {shape} {}", const_text(tensor, blobs))
            }
        }
    }
}

/// A place: buffer, offset, row stride, dtype, dims.
pub(crate) fn place_text(template: &Template, place: &Place) -> String {
    let offset = if place.offset == 0 { String::new() } else { format!("+{}", place.offset) };
    let stride = place.stride.map_or(String::new(), |stride| format!("/{stride}"));
    let dims: Vec<String> = place.dims.iter().map(|&d| Dim::to_string(template.sizes.dim(d))).collect();
    format!("{}{offset}{stride} {}[{}]", place.buffer, place.dtype, dims.join(", "))
}

fn step_text(template: &Template, step: &StepSpec) -> String {
    let places = |places: &[Place]| -> String {
        let texts: Vec<String> = places.iter().map(|p| place_text(template, p)).collect();
        texts.join(", ")
    };
    let (outputs, inputs) = (places(&step.outputs), places(&step.inputs));
    let equals = if step.outputs.is_empty() { "" } else { " = " };
    let (name, attrs) = (step.op.def().name(), attrs_text(&step.op.def().attrs()));
    format!("{outputs}{equals}{name}({inputs}) {attrs} from {}", quoted(&step.location))
}

#[cfg(test)]
pub(crate) mod tests;
