//! Placing buffers in one arena.

use std::ops::Range;

/// Alignment of every buffer in the arena, in bytes.
pub const ALIGNMENT: usize = 64;

/// A buffer to place: its bytes, and the inclusive range of steps during which it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// Size in bytes.
    pub bytes: usize,
    /// First step.
    pub first: usize,
    /// Last step.
    pub last: usize,
}

/// Offsets for a list of lifetimes, in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ArenaPlan {
    /// Byte offset of each buffer.
    pub offsets: Vec<usize>,
    /// Size of the arena.
    pub bytes: usize,
}

/// Steps per bucket of the index of placed buffers.
const BUCKET: usize = 32;

/// Buffers up to this many are also tried in other orders.
const SEARCH_LIMIT: usize = 512;

/// Places buffers so that no two that live at the same step overlap.
///
/// Largest first, each at the lowest gap that fits best; where that misses the live-bytes bound, orders by lifetime and by
/// area are tried too and the smallest arena is kept. Deterministic.
pub fn plan_arena(lifetimes: &[Lifetime]) -> ArenaPlan {
    let sized: Vec<Lifetime> =
        lifetimes.iter().map(|l| Lifetime { bytes: l.bytes.next_multiple_of(ALIGNMENT), ..*l }).collect();
    let mut order: Vec<usize> = (0..sized.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(sized[i].bytes), sized[i].first, i));
    let mut best = place(&sized, &order);
    let bound = live_bytes_bound(&sized);
    if best.bytes > bound && sized.len() <= SEARCH_LIMIT {
        let span = |l: &Lifetime| l.last - l.first + 1;
        let keys: [&dyn Fn(&Lifetime) -> usize; 3] =
            [&|l| span(l).saturating_mul(l.bytes), &|l| span(l), &|l| usize::MAX - l.first];
        for key in keys {
            order.sort_by_key(|&i| (std::cmp::Reverse(key(&sized[i])), std::cmp::Reverse(sized[i].bytes), i));
            let plan = place(&sized, &order);
            if plan.bytes < best.bytes {
                best = plan;
            }
        }
        climb(&sized, bound, &mut order, &mut best);
    }
    best
}

/// Improves the order by moving the buffer that ends highest to the front, while that helps.
fn climb(sized: &[Lifetime], bound: usize, order: &mut Vec<usize>, best: &mut ArenaPlan) {
    order.sort_by_key(|&i| (std::cmp::Reverse(sized[i].bytes), sized[i].first, i));
    for _ in 0..16 {
        if best.bytes <= bound {
            return;
        }
        let plan = place(sized, order);
        if plan.bytes < best.bytes {
            *best = plan.clone();
        }
        let top = order.iter().position(|&i| plan.offsets[i] + sized[i].bytes == plan.bytes);
        let Some(top) = top.filter(|&t| t > 0) else { return };
        let moved = order.remove(top);
        order.insert(top / 2, moved);
    }
}

/// The most bytes that live at one step: no arena can be smaller.
pub fn live_bytes_bound(lifetimes: &[Lifetime]) -> usize {
    let mut events: Vec<(usize, bool, usize)> = Vec::with_capacity(lifetimes.len() * 2);
    for l in lifetimes.iter().filter(|l| l.bytes > 0) {
        let bytes = l.bytes.next_multiple_of(ALIGNMENT);
        events.push((l.first, true, bytes));
        events.push((l.last + 1, false, bytes));
    }
    events.sort_by_key(|&(step, starts, _)| (step, starts));
    let (mut live, mut most) = (0, 0);
    for (_, starts, bytes) in events {
        live = if starts { live + bytes } else { live - bytes };
        most = most.max(live);
    }
    most
}

fn place(sized: &[Lifetime], order: &[usize]) -> ArenaPlan {
    let steps = sized.iter().map(|l| l.last + 1).max().unwrap_or(0);
    let mut index: Vec<Vec<usize>> = vec![Vec::new(); steps.div_ceil(BUCKET)];
    let mut plan = ArenaPlan { offsets: vec![0; sized.len()], bytes: 0 };
    let mut seen = vec![usize::MAX; sized.len()];
    let mut taken: Vec<Range<usize>> = Vec::new();
    for &i in order {
        let own = &sized[i];
        if own.bytes == 0 {
            continue;
        }
        taken.clear();
        for &j in index[own.first / BUCKET..=own.last / BUCKET].iter().flatten() {
            let other = &sized[j];
            if seen[j] != i && other.first <= own.last && own.first <= other.last {
                seen[j] = i;
                taken.push(plan.offsets[j]..plan.offsets[j] + other.bytes);
            }
        }
        taken.sort_by_key(|r| r.start);
        plan.offsets[i] = best_gap(&taken, own.bytes);
        plan.bytes = plan.bytes.max(plan.offsets[i] + own.bytes);
        index[own.first / BUCKET..=own.last / BUCKET].iter_mut().for_each(|bucket| bucket.push(i));
    }
    plan
}

/// The start of the smallest gap that fits; the end of what is taken if none does.
fn best_gap(taken: &[Range<usize>], bytes: usize) -> usize {
    let (mut end, mut best) = (0, None::<Range<usize>>);
    for range in taken {
        if range.start >= end + bytes && best.as_ref().is_none_or(|b| range.start - end < b.len()) {
            best = Some(end..range.start);
        }
        end = end.max(range.end);
    }
    best.map_or(end, |gap| gap.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(bytes: usize, first: usize, last: usize) -> Lifetime {
        Lifetime { bytes, first, last }
    }

    fn check(lifetimes: &[Lifetime], plan: &ArenaPlan) {
        for (i, a) in lifetimes.iter().enumerate() {
            assert!(plan.offsets[i] + a.bytes <= plan.bytes);
            for (j, b) in lifetimes.iter().enumerate().skip(i + 1) {
                let in_time = a.first <= b.last && b.first <= a.last;
                let (x, y) = (plan.offsets[i], plan.offsets[j]);
                assert!(!in_time || x + a.bytes <= y || y + b.bytes <= x, "{i} and {j} overlap");
            }
        }
    }

    #[test]
    fn chain_takes_two_buffers() {
        let chain: Vec<Lifetime> = (0..20).map(|i| life(640, i, i + 1)).collect();
        let plan = plan_arena(&chain);
        check(&chain, &plan);
        assert_eq!(plan.bytes, 1280);
    }

    #[test]
    fn random_lifetimes_never_overlap_and_stay_near_the_bound() {
        let mut state = 7u64;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % n) as usize
        };
        for _ in 0..50 {
            let lifetimes: Vec<Lifetime> = (0..100)
                .map(|_| {
                    let first = next(200);
                    life(next(5000), first, first + next(12))
                })
                .collect();
            let plan = plan_arena(&lifetimes);
            check(&lifetimes, &plan);
            assert!(plan.bytes >= live_bytes_bound(&lifetimes));
            assert!(plan.bytes as f64 <= 1.35 * live_bytes_bound(&lifetimes) as f64);
        }
    }

    #[test]
    fn empty_buffers_take_nothing() {
        assert_eq!(plan_arena(&[]).bytes, 0);
        assert_eq!(plan_arena(&[life(0, 0, 5)]).bytes, 0);
    }
}
