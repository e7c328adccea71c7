//! The plan verifier: what must hold of every specialised template, fresh or read from a file.

use super::lir::Lir;
use super::memory::ALIGNMENT;
use super::places::{BufferId, BufferKind, Place};
use super::template::{InterfaceEntry, SizeCheck, StepSpec};
use rlx_graph::InferCx;
use rlx_tensor::{Shape, SizeTable};

/// A rule of plans that is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanViolation {
    /// Two buffers live at one step and share bytes.
    #[error("buffers {first} and {second} live at the same step and overlap in the arena")]
    Overlap {
        /// One buffer.
        first: BufferId,
        /// The other.
        second: BufferId,
    },
    /// A buffer reaches past the arena.
    #[error("buffer {buffer} ends at byte {end}, past the arena's {arena}")]
    OutsideArena {
        /// The buffer.
        buffer: BufferId,
        /// Where it ends.
        end: usize,
        /// The arena's size.
        arena: usize,
    },
    /// A step uses an arena buffer outside its lifetime.
    #[error("step {step} uses buffer {buffer}, which lives from step {first} to {last}")]
    OutsideLifetime {
        /// The step.
        step: usize,
        /// The buffer.
        buffer: BufferId,
        /// First step of its life.
        first: usize,
        /// Last step of its life.
        last: usize,
    },
    /// A place reaches past its buffer.
    #[error("step {step}: a place ends at byte {end} of buffer {buffer}, which has {bytes}")]
    OutsideBuffer {
        /// The step.
        step: usize,
        /// The buffer.
        buffer: BufferId,
        /// Where the place ends.
        end: usize,
        /// The buffer's size.
        bytes: usize,
    },
    /// A step reads a buffer that no step before it wrote.
    #[error("step {step} reads buffer {buffer} before it is written")]
    Unwritten {
        /// The step.
        step: usize,
        /// The buffer.
        buffer: BufferId,
    },
    /// Rows that overlap each other.
    #[error("step {step}: the rows of a place in buffer {buffer} overlap")]
    OverlappingRows {
        /// The step.
        step: usize,
        /// The buffer.
        buffer: BufferId,
    },
    /// A buffer's life is no range of steps, or the arena does not end with its last buffer.
    #[error("{reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// An input, param, state, output or constant is not the whole of a buffer of its own.
    #[error("{what} does not fill a buffer of its own")]
    Interface {
        /// What it is, with its name.
        what: String,
    },
    /// A step writes what it may not: an input, a param or a constant.
    #[error("step {step} writes buffer {buffer}, which is read-only")]
    ReadOnly {
        /// The step.
        step: usize,
        /// The buffer.
        buffer: BufferId,
    },
}

impl Lir {
    /// Checks that no two live buffers overlap, every place is inside its buffer and lifetime, only writable buffers are
    /// written, nothing is read before it is written, and the interface fills its buffers.
    pub fn verify(&self) -> Result<(), PlanViolation> {
        self.verify_lives()?;
        self.verify_arena()?;
        self.verify_interface()?;
        self.verify_order()?;
        for (step, spec) in self.template().steps.iter().enumerate() {
            for place in spec.inputs.iter().chain(&spec.outputs) {
                self.verify_place(step, place)?;
            }
            for operand in spec.op.def().props().writes {
                let state = |p: &&Place| {
                    matches!(self.template().buffers[p.buffer.index()].kind, BufferKind::State(_))
                };
                let Some(place) = spec.inputs.get(operand) else { continue };
                if !state(&place) {
                    return Err(PlanViolation::ReadOnly { step, buffer: place.buffer });
                }
            }
            for place in &spec.outputs {
                let buffer = place.buffer;
                let kind = &self.template().buffers[buffer.index()].kind;
                if !matches!(kind, BufferKind::Arena | BufferKind::Output(_)) {
                    return Err(PlanViolation::ReadOnly { step, buffer });
                }
            }
        }
        Ok(())
    }

    fn verify_lives(&self) -> Result<(), PlanViolation> {
        let steps = self.template().steps.len().max(1);
        let mut end = 0;
        for (id, range) in self.placed() {
            let buffer = &self.template().buffers[id.index()];
            if buffer.first > buffer.last || buffer.last >= steps {
                let reason = format!("buffer {id} lives from step {} to {}", buffer.first, buffer.last);
                return Err(PlanViolation::Malformed { reason });
            }
            if !range.is_empty() {
                end = end.max(range.end.saturating_add(ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
            }
        }
        if end < self.arena_bytes() {
            let reason = format!("the arena has {} bytes, its buffers end at {end}", self.arena_bytes());
            return Err(PlanViolation::Malformed { reason });
        }
        Ok(())
    }

    fn verify_interface(&self) -> Result<(), PlanViolation> {
        let template = self.template();
        let mut owned = 0;
        type Kind = fn(usize) -> BufferKind;
        let lists: [(&str, &[InterfaceEntry], Kind); 4] = [
            ("input", template.inputs(), BufferKind::Input),
            ("param", template.params(), BufferKind::Param),
            ("state", template.states(), BufferKind::State),
            ("output", template.outputs(), BufferKind::Output),
        ];
        for (what, entries, kind) in lists {
            for (position, entry) in entries.iter().enumerate() {
                let id = entry.place.buffer;
                let buffer = &template.buffers[id.index()];
                let fills = entry.place.is_whole()
                    && buffer.kind.same_owner(&kind(position))
                    && self.end_bytes(&entry.place) == Some(self.buffer_bytes(id));
                if !fills {
                    return Err(PlanViolation::Interface { what: format!("{what} {:?}", entry.name) });
                }
                owned += 1;
            }
        }
        for (index, buffer) in template.buffers.iter().enumerate() {
            let id = BufferId::from_index(index);
            match &buffer.kind {
                BufferKind::Arena => {}
                BufferKind::Const(tensor) if tensor.bytes().len() == self.buffer_bytes(id) => {}
                BufferKind::Const(_) => {
                    return Err(PlanViolation::Interface { what: format!("the constant in buffer {id}") });
                }
                _ if owned == 0 => {
                    return Err(PlanViolation::Interface { what: format!("the value in buffer {id}") });
                }
                _ => owned -= 1,
            }
        }
        Ok(())
    }

    fn verify_order(&self) -> Result<(), PlanViolation> {
        let is_made = |kind: &BufferKind| matches!(kind, BufferKind::Arena | BufferKind::Output(_));
        let mut written: Vec<bool> = self.template().buffers.iter().map(|b| !is_made(&b.kind)).collect();
        for (step, spec) in self.template().steps.iter().enumerate() {
            if let Some(place) = spec.inputs.iter().find(|p| !written[p.buffer.index()]) {
                return Err(PlanViolation::Unwritten { step, buffer: place.buffer });
            }
            spec.outputs.iter().for_each(|place| written[place.buffer.index()] = true);
        }
        Ok(())
    }

    fn verify_arena(&self) -> Result<(), PlanViolation> {
        let mut placed: Vec<_> = self.placed().filter(|(_, range)| !range.is_empty()).collect();
        placed.sort_by_key(|(_, range)| range.start);
        let arena = self.arena_bytes();
        for (i, (first, range)) in placed.iter().enumerate() {
            if range.end > arena {
                return Err(PlanViolation::OutsideArena { buffer: *first, end: range.end, arena });
            }
            let life = &self.template().buffers[first.index()];
            for (second, _) in placed[i + 1..].iter().take_while(|(_, other)| other.start < range.end) {
                let other = &self.template().buffers[second.index()];
                if life.first <= other.last && other.first <= life.last {
                    return Err(PlanViolation::Overlap { first: *first, second: *second });
                }
            }
        }
        Ok(())
    }

    fn verify_place(&self, step: usize, place: &Place) -> Result<(), PlanViolation> {
        let id = place.buffer;
        let buffer = &self.template().buffers[id.index()];
        if matches!(buffer.kind, BufferKind::Arena) && !(buffer.first..=buffer.last).contains(&step) {
            let (first, last) = (buffer.first, buffer.last);
            return Err(PlanViolation::OutsideLifetime { step, buffer: id, first, last });
        }
        let columns = place.dims.last().map_or(1, |d| self.capacities()[d.index()]);
        if place.stride.is_some_and(|stride| stride < columns) {
            return Err(PlanViolation::OverlappingRows { step, buffer: id });
        }
        let end = self.end_bytes(place).unwrap_or(usize::MAX);
        let bytes = self.buffer_bytes(id);
        if end > bytes {
            return Err(PlanViolation::OutsideBuffer { step, buffer: id, end, bytes });
        }
        Ok(())
    }

    /// Bytes from the buffer's start to the place's end at capacity.
    fn end_bytes(&self, place: &Place) -> Option<usize> {
        let extents: Vec<usize> = place.dims.iter().map(|d| self.capacities()[d.index()]).collect();
        let elements = rlx_tensor::element_count(&extents)?;
        if elements == 0 {
            return Some(0);
        }
        let columns = extents.last().copied().unwrap_or(1);
        let end = match place.stride {
            Some(stride) => (elements / columns - 1).checked_mul(stride)?.checked_add(columns)?,
            None => elements,
        };
        let (per_block, block_bytes) = place.dtype.block();
        let elements = place.offset.checked_add(end)?;
        elements.div_ceil(per_block).checked_mul(block_bytes)
    }
}

impl StepSpec {
    /// Checks that the op's results on these operands have the shapes of the step's results, and that `checks` hold every
    /// equality that this relies on.
    pub(super) fn verify_op(&self, sizes: &SizeTable, checks: &[SizeCheck]) -> Result<(), String> {
        let shape = |place: &Place| {
            let dims = place.dims.iter().map(|&d| sizes.dim(d).clone()).collect();
            Shape::from_dims(dims, place.dtype)
        };
        let inputs: Vec<Shape> = self.inputs.iter().map(shape).collect();
        let mut cx = InferCx::default();
        let name = self.op.def().name();
        let inferred = self.op.def().infer(&mut cx, &inputs.iter().collect::<Vec<_>>());
        let inferred = inferred.map_err(|e| format!("{name}: {e}"))?;
        let written: Vec<Shape> = self.outputs.iter().map(shape).collect();
        if inferred != written {
            let list = |shapes: &[Shape]| shapes.iter().map(Shape::to_string).collect::<Vec<_>>().join(", ");
            return Err(format!("{name}: results are {}, written as {}", list(&inferred), list(&written)));
        }
        for (left, right) in cx.into_checks() {
            let held = sizes.find(&left).zip(sizes.find(&right)).is_some_and(|(left, right)| {
                checks
                    .iter()
                    .any(|c| (c.left, c.right) == (left, right) || (c.right, c.left) == (left, right))
            });
            if !held {
                return Err(format!("{name}: there is no check that {left} equals {right}"));
            }
        }
        Ok(())
    }
}
