//! Shapes of low-rank adapters: `W + alpha / rank * B A`, with `A: [rank, in]` and `B: [out, rank]`
//! (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).

use std::fmt;

use rlx_tensor::Shape;

/// Which factor of a low-rank update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LoraSide {
    /// `A: [rank, in]`, applied first.
    A,
    /// `B: [out, rank]`.
    B,
}

impl fmt::Display for LoraSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LoraSide::A => "A",
            LoraSide::B => "B",
        })
    }
}

/// Checks one factor against its base, and against the other factor where that is known. A base stored
/// `[in, out]` (as GPT-2 does) is accepted, as long as both factors agree.
///
/// Returns what was expected and what was found.
pub(super) fn check_factor(
    side: LoraSide,
    rank: usize,
    alpha: f32,
    shape: &Shape,
    base: &Shape,
    other: Option<&Shape>,
) -> Result<(), (String, String)> {
    let dims_of = |shape: &Shape| shape.known_dims().and_then(|dims| <[usize; 2]>::try_from(dims).ok());
    if rank == 0 {
        return Err(("a rank of at least 1".to_owned(), "0".to_owned()));
    }
    if !alpha.is_finite() {
        return Err(("a finite alpha".to_owned(), alpha.to_string()));
    }
    let Some([rows, columns]) = dims_of(base) else {
        return Err(("a base of two dims".to_owned(), base.to_string()));
    };
    let factor = |outer: usize| match side {
        LoraSide::A => [rank, outer],
        LoraSide::B => [outer, rank],
    };
    // What the factor's outer dim is when the base is [out, in], and when it is [in, out].
    let (straight, swapped) = match side {
        LoraSide::A => (columns, rows),
        LoraSide::B => (rows, columns),
    };
    let outer = match dims_of(shape) {
        Some(dims) if dims == factor(straight) => straight,
        Some(dims) if dims == factor(swapped) => swapped,
        _ => {
            return Err((
                format!("{side} of shape {:?} for base {base}", factor(straight)),
                shape.to_string(),
            ));
        }
    };
    let other_outer = other.and_then(dims_of).map(|dims| match side {
        LoraSide::A => dims[0],
        LoraSide::B => dims[1],
    });
    match other_outer {
        Some(other_outer) if ![(straight, swapped), (swapped, straight)].contains(&(outer, other_outer)) => {
            Err((
                format!("factors that span base {base}"),
                format!("{side} {shape} beside one that spans {other_outer}"),
            ))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlx_tensor::DType;

    fn shape(dims: [usize; 2]) -> Shape {
        Shape::new(&dims, DType::F32)
    }

    #[test]
    fn factors_fit_their_base_either_way_round_but_not_both_ways() {
        let base = shape([30, 20]);
        let check = |side, dims, other: Option<[usize; 2]>| {
            check_factor(side, 4, 8.0, &shape(dims), &base, other.map(shape).as_ref())
        };
        check(LoraSide::A, [4, 20], None).unwrap();
        check(LoraSide::B, [30, 4], Some([4, 20])).unwrap();
        check(LoraSide::A, [4, 30], Some([20, 4])).unwrap();
        assert!(check(LoraSide::B, [20, 4], Some([4, 20])).is_err());
        assert!(check(LoraSide::A, [4, 21], None).is_err());
        assert!(check(LoraSide::A, [5, 20], None).is_err());
        assert!(check(LoraSide::B, [4, 30], None).is_err());
    }

    #[test]
    fn rank_zero_odd_alpha_and_a_base_that_is_no_matrix_are_refused() {
        let base = shape([30, 20]);
        assert!(check_factor(LoraSide::A, 0, 1.0, &shape([0, 20]), &base, None).is_err());
        assert!(check_factor(LoraSide::A, 1, f32::NAN, &shape([1, 20]), &base, None).is_err());
        let vector = Shape::new(&[20usize], DType::F32);
        assert!(check_factor(LoraSide::A, 1, 1.0, &shape([1, 20]), &vector, None).is_err());
    }
}
