//! Where buffers stand in a device's arena: first the words that checks set, then the plan's arena, then what the caller owns.

use crate::lower::{blocks, is_weight};
use rlx::backend::BackendError;
use rlx::plan::{BufferId, BufferKind, Lifetime, Lir, Place, Template, plan_arena};
use rlx_tensor::DType;

/// Words between starts of buffers.
const ALIGN: usize = 64;

/// The dtype of each buffer's elements; `None` for a buffer that no step uses.
///
/// # Errors
/// [`BackendError::Unsupported`] for a buffer whose elements are seen as two dtypes.
pub(crate) fn buffer_dtypes(template: &Template) -> Result<Vec<Option<DType>>, BackendError> {
    let mut dtypes: Vec<Option<DType>> = vec![None; template.buffers().len()];
    for step in template.steps() {
        for Place { buffer, dtype, .. } in step.inputs.iter().chain(&step.outputs) {
            match dtypes[buffer.index()].replace(*dtype) {
                Some(other) if other != *dtype => {
                    return Err(BackendError::Unsupported {
                        op: step.op.def().name().to_owned(),
                        location: step.location.clone(),
                        reason: format!("{buffer} is seen as {other} and as {dtype}"),
                    });
                }
                _ => {}
            }
        }
    }
    Ok(dtypes)
}

/// Places of buffers in words.
#[derive(Debug)]
pub(super) struct Layout {
    offsets: Vec<Option<usize>>,
    /// Words of each buffer: one an element, but for packed weights.
    elements: Vec<usize>,
    /// Words at the start that checks set.
    pub guards: usize,
    /// Where words for what stands between two launches of a step begin and end.
    pub scratch: [usize; 2],
    /// Words of the arena.
    pub words: usize,
}

impl Layout {
    /// `apart` are buffers that are bindings of their own; `scratch` words are for what stands between two launches of a step.
    pub fn new(lir: &Lir, dtypes: &[Option<DType>], apart: &[bool], guards: usize, scratch: usize) -> Self {
        let template = lir.template();
        let count = |(id, dtype): (BufferId, &Option<DType>)| {
            let (per, bytes) = dtype.map_or((1, 1), DType::block);
            let elements = lir.buffer_bytes(id) / bytes * per;
            match dtype {
                Some(dtype) if is_weight(template, id) => blocks::weight_words(*dtype, elements),
                _ => elements,
            }
        };
        let ids = || template.buffer_ids().map(|(id, _)| id);
        let elements: Vec<usize> = ids().zip(dtypes).map(count).collect();
        let used =
            |id: BufferId| dtypes[id.index()].is_some() && !apart[id.index()] && !is_weight(template, id);
        let in_arena = |id: BufferId| matches!(template.buffers()[id.index()].kind, BufferKind::Arena);
        let shared: Vec<BufferId> = ids().filter(|&id| used(id) && in_arena(id)).collect();
        let lifetimes: Vec<Lifetime> = shared
            .iter()
            .map(|id| {
                let buffer = &template.buffers()[id.index()];
                Lifetime { bytes: elements[id.index()] * 4, first: buffer.first, last: buffer.last }
            })
            .collect();
        let arena = plan_arena(&lifetimes);
        let mut offsets = vec![None; elements.len()];
        let first = guards.max(1).next_multiple_of(ALIGN);
        let start = first + scratch.next_multiple_of(ALIGN);
        for (id, offset) in shared.iter().zip(&arena.offsets) {
            offsets[id.index()] = Some(start + offset / 4);
        }
        let mut words = (start + arena.bytes.div_ceil(4)).next_multiple_of(ALIGN);
        for id in ids().filter(|&id| used(id) && !in_arena(id)) {
            offsets[id.index()] = Some(words);
            words += elements[id.index()].next_multiple_of(ALIGN);
        }
        Layout { offsets, elements, guards, scratch: [first, start], words }
    }

    /// The first word of a buffer in the arena.
    pub fn placed(&self, id: BufferId) -> Option<usize> {
        self.offsets[id.index()]
    }

    /// The first element of a buffer in its binding.
    pub fn offset(&self, id: BufferId) -> usize {
        self.placed(id).unwrap_or(0)
    }

    pub fn elements(&self, id: BufferId) -> usize {
        self.elements[id.index()]
    }

    /// The first element behind a buffer in its binding.
    pub fn end(&self, id: BufferId) -> usize {
        self.offset(id) + self.elements(id)
    }
}
