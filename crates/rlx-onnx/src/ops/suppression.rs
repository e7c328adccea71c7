//! Boxes that do not overlap.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::value::Value;
use rlx_tensor::Tensor;
use std::cmp::Ordering;

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[Row::host("NonMaxSuppression", non_max_suppression)];

/// Corners of a box, lower first.
fn corners(numbers: &[f64], centred: bool) -> [f64; 4] {
    let [a, b, c, d] = [numbers[0], numbers[1], numbers[2], numbers[3]];
    match centred {
        true => [b - d / 2.0, a - c / 2.0, b + d / 2.0, a + c / 2.0],
        false => [a.min(c), b.min(d), a.max(c), b.max(d)],
    }
}

/// The part of two boxes' union that both cover.
fn overlap(a: &[f64; 4], b: &[f64; 4]) -> f64 {
    let side = |low: usize| (a[low + 2].min(b[low + 2]) - a[low].max(b[low])).max(0.0);
    let area = |c: &[f64; 4]| (c[2] - c[0]) * (c[3] - c[1]);
    let both = side(0) * side(1);
    let union = area(a) + area(b) - both;
    if union > 0.0 { both / union } else { 0.0 }
}

fn non_max_suppression(h: &Host<'_>) -> Evaluated {
    let (&[batch, boxes, four], &[score_batch, classes, scored]) = (h.dims(0)?, h.dims(1)?) else {
        return invalid("boxes and scores must have rank 3");
    };
    if four != 4 || score_batch != batch || scored != boxes {
        return invalid(format!("scores {:?} do not fit boxes {:?}", h.dims(1)?, h.dims(0)?));
    }
    let single = |operand: usize| h.optional(operand).map(Value::floats).transpose();
    let first = |values: Option<Vec<f64>>| values.and_then(|v| v.first().copied());
    let most = first(single(2)?).unwrap_or(0.0).clamp(0.0, boxes as f64) as usize;
    let overlap_limit = first(single(3)?).unwrap_or(0.0);
    let score_limit = first(single(4)?);
    let centred = h.node.flag("center_point_box", false)?;
    let (numbers, scores) = (h.floats(0)?, h.floats(1)?);
    let mut chosen = Vec::new();
    for image in 0..batch {
        let at = |i: usize| corners(&numbers[(image * boxes + i) * 4..][..4], centred);
        for class in 0..classes {
            let row = &scores[(image * classes + class) * boxes..][..boxes];
            let mut order: Vec<usize> =
                (0..boxes).filter(|&i| score_limit.is_none_or(|limit| row[i] > limit)).collect();
            order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap_or(Ordering::Equal));
            let mut kept: Vec<[f64; 4]> = Vec::new();
            for i in order {
                if kept.len() == most {
                    break;
                }
                let own = at(i);
                if kept.iter().all(|other| overlap(&own, other) <= overlap_limit) {
                    kept.push(own);
                    chosen.extend([image as i64, class as i64, i as i64]);
                }
            }
        }
    }
    Ok(vec![Tensor::from_slice(&[chosen.len() / 3, 3], &chosen)?.into()])
}
