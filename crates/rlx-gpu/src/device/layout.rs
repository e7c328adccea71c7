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

/// Where something stands in a run's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spot {
    /// The segment of the arena.
    pub segment: usize,
    /// The first word in it.
    pub at: usize,
}

/// Places of buffers in words.
#[derive(Debug)]
pub(super) struct Layout {
    spots: Vec<Option<Spot>>,
    /// Words of each buffer: one an element, but for packed weights.
    elements: Vec<usize>,
    /// Words at the start of the first segment that checks set.
    pub guards: usize,
    /// Where words for what stands between two launches of a step begin.
    pub scratch: Spot,
    /// Words of what stands there.
    scratch_words: usize,
    /// Words of each segment of the arena: one, unless a binding holds less than the whole.
    pub segments: Vec<usize>,
}

/// Something that needs words from one step to another.
struct Item {
    words: usize,
    first: usize,
    last: usize,
}

impl Layout {
    /// `apart` are buffers that are bindings of their own; `scratch` words are for what stands between two launches of a step; a segment
    /// has `most` words at most.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] names what a segment does not hold.
    pub fn new(
        lir: &Lir,
        dtypes: &[Option<DType>],
        apart: &[bool],
        guards: usize,
        scratch: usize,
        most: usize,
    ) -> Result<Self, BackendError> {
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
        let others: Vec<BufferId> = ids().filter(|&id| used(id) && !in_arena(id)).collect();
        let lifetimes: Vec<Lifetime> = shared
            .iter()
            .map(|id| {
                let buffer = &template.buffers()[id.index()];
                Lifetime { bytes: elements[id.index()] * 4, first: buffer.first, last: buffer.last }
            })
            .collect();
        let arena = plan_arena(&lifetimes);
        let mut layout = Layout {
            spots: vec![None; elements.len()],
            guards,
            scratch: Spot { segment: 0, at: guards.max(1).next_multiple_of(ALIGN) },
            scratch_words: scratch,
            segments: Vec::new(),
            elements,
        };
        let start = layout.scratch.at + scratch.next_multiple_of(ALIGN);
        for (id, offset) in shared.iter().zip(&arena.offsets) {
            layout.spots[id.index()] = Some(Spot { segment: 0, at: start + offset / 4 });
        }
        let mut words = (start + arena.bytes.div_ceil(4)).next_multiple_of(ALIGN);
        for id in &others {
            layout.spots[id.index()] = Some(Spot { segment: 0, at: words });
            words += layout.elements[id.index()].next_multiple_of(ALIGN);
        }
        layout.segments.push(words);
        if words > most {
            let buffers: Vec<BufferId> = shared.into_iter().chain(others).collect();
            layout.split(template, &buffers, most / ALIGN * ALIGN)?;
        }
        Ok(layout)
    }

    /// Places everything anew, in segments of at most so many words.
    fn split(&mut self, template: &Template, ids: &[BufferId], most: usize) -> Result<(), BackendError> {
        let always = |words: usize| Item { words, first: 0, last: usize::MAX };
        let mut items = vec![always(self.guards.max(1)), always(self.scratch_words)];
        items.extend(ids.iter().map(|id| {
            let (buffer, words) = (&template.buffers()[id.index()], self.elements[id.index()]);
            match buffer.kind {
                BufferKind::Arena => Item { words, first: buffer.first, last: buffer.last },
                _ => always(words),
            }
        }));
        if let Some(large) = items.iter().position(|item| item.words > most) {
            let what = match large {
                0 => "the checks of a run".to_owned(),
                1 => "what stands between two kernels of a step".to_owned(),
                at => named(template, ids[at - 2]),
            };
            return Err(too_large(&what, items[large].words, most));
        }
        let (spots, segments) = pack(&items, most);
        self.scratch = spots[1];
        ids.iter().zip(&spots[2..]).for_each(|(id, &spot)| self.spots[id.index()] = Some(spot));
        self.segments = segments;
        Ok(())
    }

    /// The first word of a buffer in the arena.
    pub fn placed(&self, id: BufferId) -> Option<Spot> {
        self.spots[id.index()]
    }

    /// The first element of a buffer in its binding.
    pub fn offset(&self, id: BufferId) -> usize {
        self.placed(id).map_or(0, |spot| spot.at)
    }

    pub fn elements(&self, id: BufferId) -> usize {
        self.elements[id.index()]
    }

    /// The first element behind a buffer in its binding.
    pub fn end(&self, id: BufferId) -> usize {
        self.offset(id) + self.elements(id)
    }

    /// The first word behind what stands between two launches of a step.
    pub fn scratch_end(&self) -> usize {
        self.scratch.at + self.scratch_words
    }

    /// Words of all segments.
    pub fn words(&self) -> usize {
        self.segments.iter().sum()
    }
}

/// What one binding does not hold, and what helps.
pub(super) fn too_large(what: &str, words: usize, most: usize) -> BackendError {
    let limit = most.saturating_mul(4);
    let what = format!(
        "{what} in one binding, which on this device has at most {limit} bytes; fewer rows, a shorter context, a smaller type of cache or another device help"
    );
    BackendError::OutOfMemory { bytes: (words as u64).saturating_mul(4), what }
}

/// A buffer as a caller knows it.
fn named(template: &Template, id: BufferId) -> String {
    match &template.buffers()[id.index()].kind {
        BufferKind::Input(at) => format!("input {}", template.inputs()[*at].name),
        BufferKind::State(at) => format!("state {}", template.states()[*at].name),
        kind => {
            let writes = |step: &&rlx::plan::StepSpec| step.outputs.iter().any(|place| place.buffer == id);
            match template.steps().iter().find(writes) {
                Some(step) => format!("the result of {} at {}", step.op.def().name(), step.location),
                None if matches!(kind, BufferKind::Const(_)) => "a constant".to_owned(),
                None => id.to_string(),
            }
        }
    }
}

/// A spot for each item, the first at the start of the first segment, and the words of the segments: large ones first, each in the first
/// segment and there as low as others that live at the same time allow.
fn pack(items: &[Item], most: usize) -> (Vec<Spot>, Vec<usize>) {
    let mut order: Vec<usize> = (1..items.len()).collect();
    order.sort_by_key(|&at| (std::cmp::Reverse(items[at].words), items[at].first, at));
    let mut spots = vec![Spot { segment: 0, at: 0 }; items.len()];
    // Items of each segment by their first word.
    let mut placed: Vec<Vec<usize>> = Vec::new();
    let mut segments: Vec<usize> = Vec::new();
    for at in std::iter::once(0).chain(order) {
        let item = &items[at];
        let words = item.words.next_multiple_of(ALIGN);
        let gap = |own: &Vec<usize>, spots: &[Spot]| {
            let mut from = 0;
            for &other in own {
                let other_item = &items[other];
                if other_item.first <= item.last && item.first <= other_item.last {
                    if from + words <= spots[other].at {
                        break;
                    }
                    from = from.max(spots[other].at + other_item.words.next_multiple_of(ALIGN));
                }
            }
            (from + words <= most).then_some(from)
        };
        let found = placed.iter().enumerate().find_map(|(s, own)| Some((s, gap(own, &spots)?)));
        let (segment, from) = found.unwrap_or_else(|| {
            placed.push(Vec::new());
            segments.push(0);
            (placed.len() - 1, 0)
        });
        spots[at] = Spot { segment, at: from };
        let own = &mut placed[segment];
        let position = own.partition_point(|&other| spots[other].at <= from);
        own.insert(position, at);
        segments[segment] = segments[segment].max(from + words);
    }
    (spots, segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_that_live_at_once_share_no_word_and_no_segment_is_too_large() {
        let mut seed = 1u32;
        let mut next = |below: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % below
        };
        let most = 20 * ALIGN;
        let mut items = vec![Item { words: 3, first: 0, last: usize::MAX }];
        for _ in 0..200 {
            let (words, first) = (next(20 * ALIGN as u32 + 1) as usize, next(50) as usize);
            items.push(Item { words, first, last: first + next(8) as usize });
        }
        let (spots, segments) = pack(&items, most);
        assert_eq!(spots[0], Spot { segment: 0, at: 0 });
        assert!(segments.iter().all(|&words| words <= most) && segments.len() > 3, "{segments:?}");
        for (at, (a, one)) in spots.iter().zip(&items).enumerate() {
            assert!(a.at % ALIGN == 0 && a.at + one.words <= segments[a.segment]);
            for (b, other) in spots.iter().zip(&items).skip(at + 1) {
                let at_once = one.first <= other.last && other.first <= one.last;
                let share = a.segment == b.segment && a.at < b.at + other.words && b.at < a.at + one.words;
                assert!(!(at_once && share), "{a:?} {b:?}");
            }
        }
        let live = |step: usize| {
            let own = items.iter().filter(|item| (item.first..=item.last).contains(&step));
            own.map(|item| item.words).sum::<usize>()
        };
        let least = (0..60).map(live).max().unwrap();
        assert!(segments.iter().sum::<usize>() < least * 2, "{least} {segments:?}");
    }
}
