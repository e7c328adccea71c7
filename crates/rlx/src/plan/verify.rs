//! The plan verifier: what must hold of every specialised template, fresh or read from a file.

use super::lir::Lir;
use super::places::{BufferId, BufferKind, Place};

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
    /// Checks that no two live buffers overlap, every place is inside its buffer and lifetime, and only writable
    /// buffers are written.
    pub fn verify(&self) -> Result<(), PlanViolation> {
        self.verify_arena()?;
        for (step, spec) in self.template().steps.iter().enumerate() {
            for place in spec.inputs.iter().chain(&spec.outputs) {
                self.verify_place(step, place)?;
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
