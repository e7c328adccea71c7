//! Classical models: labels, thresholds, trees.

use super::Row;
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::Host;
use crate::model::NodeDef;
use crate::value::{ElementType, TextTensor, Value, from_floats};
use rlx_graph::eval::from_i64;
use rlx_tensor::{DType, Tensor};
use std::collections::HashMap;

const ML: &str = "ai.onnx.ml";

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("LabelEncoder", label_encoder).of(ML),
    Row::host("ArrayFeatureExtractor", array_features).of(ML),
    Row::host("Binarizer", binarizer).of(ML),
    Row::host("TreeEnsemble", tree_ensemble).of(ML),
];

/// A list that is spelled as one of several attributes.
fn listed(node: &NodeDef, name: &str) -> Result<Option<Value>, Refusal> {
    if let Some(value) = node.tensor_opt(&format!("{name}_tensor"))? {
        return Ok(Some(value.clone()));
    }
    if let Some(texts) = node.texts_opt(&format!("{name}_strings"))? {
        return Ok(Some(Value::Text(TextTensor { dims: vec![texts.len()], items: texts.to_vec() })));
    }
    if let Some(ints) = node.ints_opt(&format!("{name}_int64s"))? {
        return Ok(Some(crate::decode::int_vector(&ints)));
    }
    match node.floats_opt(&format!("{name}_floats"))? {
        Some(floats) => Ok(Some(from_floats(ElementType::Plain(DType::F32), &[floats.len()], &floats)?)),
        None => Ok(None),
    }
}

/// What a label is looked up by: text, or the bits of a number with all NaN alike.
fn keys(value: &Value) -> Result<Vec<String>, Refusal> {
    match value {
        Value::Text(text) => Ok(text.items.clone()),
        other => Ok(other
            .floats()?
            .iter()
            .map(|v| if v.is_nan() { "nan".into() } else { format!("{v:?}") })
            .collect()),
    }
}

fn label_encoder(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (Some(from), Some(to)) = (listed(h.node, "keys")?, listed(h.node, "values")?) else {
        return invalid("keys or values are missing");
    };
    let mut known: HashMap<String, usize> = HashMap::new();
    for (at, key) in keys(&from)?.into_iter().enumerate() {
        known.entry(key).or_insert(at);
    }
    let found: Vec<Option<usize>> = keys(h.value(0)?)?.iter().map(|k| known.get(k).copied()).collect();
    let dims = h.dims(0)?;
    let default = h.node.tensor_opt("default_tensor")?;
    Ok(vec![match &to {
        Value::Text(text) => {
            let other = h.node.text("default_string", "_Unused")?;
            let item =
                |at: &Option<usize>| at.and_then(|i| text.items.get(i).cloned()).unwrap_or(other.to_owned());
            Value::Text(TextTensor { dims: dims.to_vec(), items: found.iter().map(item).collect() })
        }
        Value::Tensor(t) if t.dtype().is_int() => {
            let other = match default {
                Some(value) => value.ints()?.first().copied().unwrap_or(-1),
                None => h.node.int("default_int64", -1)?,
            };
            let all = to.ints()?;
            let values: Vec<i64> = found.iter().map(|at| at.map_or(other, |i| all[i])).collect();
            from_i64(dims, t.dtype(), &values)?.into()
        }
        other_type => {
            let other = match default {
                Some(value) => value.floats()?.first().copied().unwrap_or(-0.0),
                None => h.node.float("default_float", -0.0)?,
            };
            let all = to.floats()?;
            let values: Vec<f64> = found.iter().map(|at| at.map_or(other, |i| all[i])).collect();
            let element = other_type.element().unwrap_or(ElementType::Plain(DType::F32));
            from_floats(element, dims, &values)?
        }
    }])
}

fn array_features(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let x = h.tensor(0)?;
    let at = h.ints(1)?;
    let width = x.dims().last().copied().unwrap_or(1);
    let element = x.dtype().element_bytes().unwrap_or(1);
    let mut bytes = Vec::new();
    for row in x.bytes().chunks((width * element).max(1)) {
        for &i in &at {
            let Some(i) = usize::try_from(i).ok().filter(|&i| i < width) else {
                return invalid(format!("index {i} is outside 0..{width}"));
            };
            bytes.extend_from_slice(&row[i * element..(i + 1) * element]);
        }
    }
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        Some(last) => *last = at.len(),
        None => dims.push(at.len()),
    }
    if dims.len() == 1 {
        dims.insert(0, 1);
    }
    Ok(vec![Tensor::from_bytes(&dims, x.dtype(), &bytes)?.into()])
}

fn binarizer(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let threshold = h.node.float("threshold", 0.0)?;
    let values: Vec<f64> = h.floats(0)?.iter().map(|&v| f64::from(u8::from(v > threshold))).collect();
    Ok(vec![from_floats(h.element(0)?, h.dims(0)?, &values)?])
}

/// The trees of an ensemble, a column for each property of a node.
struct Trees {
    feature: Vec<i64>,
    mode: Vec<i64>,
    split: Vec<f64>,
    missing: Vec<i64>,
    branch: [Vec<i64>; 2],
    leaf: [Vec<i64>; 2],
    members: Vec<Vec<f64>>,
    target: Vec<i64>,
    weight: Vec<f64>,
}

impl Trees {
    fn of(node: &NodeDef) -> Result<Trees, Refusal> {
        let ints = |name: &str| Ok::<_, Refusal>(node.ints_opt(name)?.unwrap_or_default());
        let numbers = |name: &str| match node.tensor_opt(name)? {
            Some(value) => value.floats(),
            None => Ok(Vec::new()),
        };
        let mode: Vec<i64> = numbers("nodes_modes")?.into_iter().map(|v| v as i64).collect();
        let mut sets =
            numbers("membership_values")?.split(|v| v.is_nan()).map(<[f64]>::to_vec).collect::<Vec<_>>();
        sets.reverse();
        let members = mode.iter().map(|&m| if m == 6 { sets.pop().unwrap_or_default() } else { Vec::new() });
        Ok(Trees {
            members: members.collect(),
            mode,
            feature: ints("nodes_featureids")?,
            split: numbers("nodes_splits")?,
            missing: ints("nodes_missing_value_tracks_true")?,
            branch: [ints("nodes_falsenodeids")?, ints("nodes_truenodeids")?],
            leaf: [ints("nodes_falseleafs")?, ints("nodes_trueleafs")?],
            target: ints("leaf_targetids")?,
            weight: numbers("leaf_weights")?,
        })
    }

    fn goes_true(&self, at: usize, x: &[f64]) -> Option<bool> {
        let value = *x.get(usize::try_from(*self.feature.get(at)?).ok()?)?;
        let split = *self.split.get(at)?;
        let holds = match self.mode.get(at)? {
            0 => value <= split,
            1 => value < split,
            2 => value >= split,
            3 => value > split,
            4 => value == split,
            5 => value != split,
            6 => self.members[at].contains(&value),
            _ => return None,
        };
        Some(holds || (value.is_nan() && self.missing.get(at) == Some(&1)))
    }

    /// The leaf that a sample comes to; `None` for a tree that leads nowhere or in a circle.
    fn leaf_of(&self, root: usize, x: &[f64]) -> Option<usize> {
        let mut at = root;
        for _ in 0..=self.mode.len() {
            let side = usize::from(self.goes_true(at, x)?);
            let next = usize::try_from(*self.branch[side].get(at)?).ok()?;
            if *self.leaf[side].get(at)? == 1 {
                return Some(next);
            }
            at = next;
        }
        None
    }
}

fn tree_ensemble(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let trees = Trees::of(h.node)?;
    let roots = h.node.ints_opt("tree_roots")?.unwrap_or_default();
    let targets = usize::try_from(h.node.int("n_targets", 0)?).unwrap_or(0).min(1 << 24);
    let kind = h.node.int("aggregate_function", 1)?;
    if h.node.int("post_transform", 0)? != 0 {
        return unsupported("a transform of the scores");
    }
    let [rows, width] = h.dims(0)?[..] else { return invalid("samples must have rank 2") };
    let x = h.floats(0)?;
    let start = match kind {
        2 => f64::INFINITY,
        3 => f64::NEG_INFINITY,
        _ => 0.0,
    };
    let mut scores = vec![start; rows * targets];
    for (row, sample) in x.chunks(width.max(1)).enumerate() {
        for &root in &roots {
            let leaf = usize::try_from(root).ok().and_then(|root| trees.leaf_of(root, sample));
            let found = leaf.and_then(|leaf| {
                let target = usize::try_from(*trees.target.get(leaf)?).ok().filter(|&t| t < targets)?;
                Some((target, *trees.weight.get(leaf)?))
            });
            let Some((target, weight)) = found else {
                return invalid(format!("tree {root} leads to no leaf"));
            };
            let score = &mut scores[row * targets + target];
            *score = match kind {
                2 => score.min(weight),
                3 => score.max(weight),
                _ => *score + weight,
            };
        }
    }
    if kind == 0 {
        scores.iter_mut().for_each(|s| *s /= roots.len().max(1) as f64);
    }
    Ok(vec![from_floats(h.element(0)?, &[rows, targets], &scores)?])
}
