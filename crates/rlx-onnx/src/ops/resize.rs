//! Resizing: each axis by itself, as a weighted sum of gathered elements.

use super::Row;
use crate::error::{Refusal, invalid, unsupported};
use crate::lower::Lowering;
use crate::model::axis_of;
use crate::value::Value;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::gather::Gather;
use rlx_tensor::DType;

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[Row::lower("Resize", resize), Row::lower("Upsample", upsample)];

/// How elements are combined.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

/// What a node asks for, whatever the axis.
struct Request {
    mode: Mode,
    coordinates: String,
    nearest: String,
    cubic: f64,
    exclude_outside: bool,
    antialias: bool,
    extrapolation: f64,
}

/// One axis: extents, scale, and the part of it that is looked at.
struct AxisRequest {
    from: usize,
    to: usize,
    scale: f64,
    /// Extent that coordinates are spread over: `to`, or what the scale alone would give.
    natural: f64,
    region: (f64, f64),
}

/// For each result, the elements it is made of; nothing where it is outside.
type Taps = Vec<Option<Vec<(usize, f64)>>>;

impl Request {
    fn read(l: &Lowering<'_>) -> Result<Self, Refusal> {
        let node = l.node;
        let mode = match node.text("mode", "nearest")? {
            "nearest" => Mode::Nearest,
            "linear" | "bilinear" | "trilinear" => Mode::Linear,
            "cubic" => Mode::Cubic,
            other => return invalid(format!("mode {other:?}")),
        };
        Ok(Self {
            mode,
            coordinates: node.text("coordinate_transformation_mode", "half_pixel")?.to_owned(),
            nearest: node.text("nearest_mode", "round_prefer_floor")?.to_owned(),
            cubic: node.float("cubic_coeff_a", -0.75)?,
            exclude_outside: node.flag("exclude_outside", false)?,
            antialias: node.flag("antialias", false)?,
            extrapolation: node.float("extrapolation_value", 0.0)?,
        })
    }

    /// Where result `i` of an axis lies in the operand.
    fn coordinate(&self, axis: &AxisRequest, i: usize) -> Result<f64, Refusal> {
        let (i, from, scale) = (i as f64, axis.from as f64, axis.scale);
        Ok(match self.coordinates.as_str() {
            "half_pixel" => (i + 0.5) / scale - 0.5,
            "half_pixel_symmetric" => {
                let adjust = axis.to as f64 / axis.natural;
                let centre = from / 2.0;
                centre * (1.0 - adjust) + (i + 0.5) / scale - 0.5
            }
            "pytorch_half_pixel" if axis.to > 1 => (i + 0.5) / scale - 0.5,
            "pytorch_half_pixel" => 0.0,
            "align_corners" if axis.natural > 1.0 => i * (from - 1.0) / (axis.natural - 1.0),
            "align_corners" => 0.0,
            "asymmetric" => i / scale,
            "tf_half_pixel_for_nn" => (i + 0.5) / scale,
            "tf_crop_and_resize" => {
                let (start, end) = axis.region;
                match axis.to {
                    1 => 0.5 * (start + end) * (from - 1.0),
                    to => start * (from - 1.0) + i * (end - start) * (from - 1.0) / (to as f64 - 1.0),
                }
            }
            other => return invalid(format!("coordinate_transformation_mode {other:?}")),
        })
    }

    fn taps(&self, axis: &AxisRequest) -> Result<Taps, Refusal> {
        (0..axis.to)
            .map(|i| {
                let at = self.coordinate(axis, i)?;
                let outside = at < 0.0 || at > axis.from as f64 - 1.0;
                if self.coordinates == "tf_crop_and_resize" && outside {
                    return Ok(None);
                }
                Ok(Some(match self.mode {
                    Mode::Nearest => vec![(self.nearest_to(axis, at)?, 1.0)],
                    Mode::Linear => self.weighted(axis, at, 1.0, |t| (1.0 - t.abs()).max(0.0)),
                    Mode::Cubic => self.weighted(axis, at, 2.0, |t| cubic(t.abs(), self.cubic)),
                }))
            })
            .collect()
    }

    fn nearest_to(&self, axis: &AxisRequest, at: f64) -> Result<usize, Refusal> {
        let whole = match self.nearest.as_str() {
            "round_prefer_floor" if at.fract().abs() == 0.5 => at.floor(),
            "round_prefer_ceil" if at.fract().abs() == 0.5 => at.ceil(),
            "round_prefer_floor" | "round_prefer_ceil" => at.round(),
            "floor" => at.floor(),
            "ceil" => at.ceil(),
            other => return invalid(format!("nearest_mode {other:?}")),
        };
        Ok(whole.clamp(0.0, axis.from as f64 - 1.0) as usize)
    }

    /// Elements within `reach` of a coordinate (further where several fall on one result), with their weights.
    fn weighted(
        &self,
        axis: &AxisRequest,
        at: f64,
        reach: f64,
        of: impl Fn(f64) -> f64,
    ) -> Vec<(usize, f64)> {
        let squeeze = if self.antialias { axis.scale.min(1.0) } else { 1.0 };
        let reach = reach / squeeze;
        let last = axis.from as i64 - 1;
        let (first, end) = ((at - reach).floor() as i64 + 1, (at + reach).ceil() as i64 - 1);
        let mut taps: Vec<(i64, f64)> = (first..=end).map(|j| (j, of((j as f64 - at) * squeeze))).collect();
        if self.exclude_outside {
            taps.retain(|(j, _)| (0..=last).contains(j));
        }
        let total: f64 = taps.iter().map(|(_, w)| w).sum();
        let scale = if total == 0.0 || !(self.exclude_outside || self.antialias) { 1.0 } else { 1.0 / total };
        let mut merged: Vec<(usize, f64)> = Vec::with_capacity(taps.len());
        for (j, weight) in taps {
            let j = j.clamp(0, last.max(0)) as usize;
            match merged.last_mut() {
                Some((known, sum)) if *known == j => *sum += weight * scale,
                _ => merged.push((j, weight * scale)),
            }
        }
        merged
    }
}

fn cubic(t: f64, a: f64) -> f64 {
    match t {
        t if t <= 1.0 => ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0,
        t if t < 2.0 => ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a,
        _ => 0.0,
    }
}

/// One axis of a value resized.
fn along(l: &mut Lowering<'_>, x: ValueId, axis: usize, taps: &Taps, fill: f64) -> Result<ValueId, Refusal> {
    let dtype = l.shape_of(x).dtype();
    let rank = l.dims_of(x)?.len();
    let width = taps.iter().flatten().map(Vec::len).max().unwrap_or(1).max(1);
    let at = |tap: usize| -> Vec<i64> {
        let index =
            |t: &Option<Vec<(usize, f64)>>| t.as_ref().map_or(0, |t| t[tap.min(t.len() - 1)].0 as i64);
        taps.iter().map(index).collect()
    };
    let weight = |tap: usize| -> Vec<f64> {
        let weight = |t: &Option<Vec<(usize, f64)>>| t.as_ref().and_then(|t| t.get(tap)).map_or(0.0, |t| t.1);
        taps.iter().map(weight).collect()
    };
    let mut dims = vec![1; rank];
    dims[axis] = taps.len();
    let mut sum = None;
    for tap in 0..width {
        let indices = l.int_vector(&at(tap))?;
        let part = l.add(Gather { axis }, &[x, indices])?;
        let weights = weight(tap);
        let term = if width == 1 {
            part
        } else {
            let weights = rlx_graph::eval::from_f64(&dims, dtype, &weights)?;
            let weights = l.tensor(weights);
            l.expand().binary(BinaryOp::Mul, part, weights)?
        };
        sum = Some(match sum {
            None => term,
            Some(sum) => l.expand().binary(BinaryOp::Add, sum, term)?,
        });
    }
    let Some(sum) = sum else { return Ok(x) };
    if taps.iter().all(Option::is_some) {
        return Ok(sum);
    }
    let inside: Vec<i64> = taps.iter().map(|t| i64::from(t.is_some())).collect();
    let inside = l.tensor(rlx_graph::eval::from_i64(&dims, DType::Bool, &inside)?);
    let mut e = l.expand();
    let fill = e.number(fill, dtype)?;
    Ok(e.select(inside, sum, fill)?)
}

/// All axes of a value resized; integers through F32.
fn apply(l: &mut Lowering<'_>, request: &Request, axes: &[(usize, AxisRequest)]) -> Lowered {
    let dtype = l.dtype(0)?;
    let x = l.value(0)?;
    let whole = dtype.is_int() && request.mode != Mode::Nearest;
    let mut y = if whole { l.cast(x, DType::F32)? } else { x };
    for (axis, wanted) in axes {
        if wanted.from == 0 {
            return invalid(format!("axis {axis} has no elements"));
        }
        let taps = request.taps(wanted)?;
        let same = |(i, t): (usize, &Option<Vec<(usize, f64)>>)| t.as_deref() == Some(&[(i, 1.0)]);
        let unchanged = wanted.from == wanted.to && taps.iter().enumerate().all(same);
        if !unchanged {
            y = along(l, y, *axis, &taps, request.extrapolation)?;
        }
    }
    Ok(vec![if whole { l.cast(y, dtype)? } else { y }])
}

fn numbers(l: &mut Lowering<'_>, operand: usize) -> Result<Vec<f64>, Refusal> {
    if l.has(operand) { l.known(operand)?.floats() } else { Ok(Vec::new()) }
}

fn resize(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let mut request = Request::read(l)?;
    let old = l.opset() < 11;
    if old {
        request.coordinates = "asymmetric".to_owned();
        request.nearest = "floor".to_owned();
    }
    let (roi, scales, sizes) = match old {
        true => (Vec::new(), numbers(l, 1)?, Vec::new()),
        false => (numbers(l, 1)?, numbers(l, 2)?, numbers(l, 3)?),
    };
    let axes: Vec<usize> = match l.node.ints_opt("axes")? {
        Some(axes) => axes.iter().map(|&a| axis_of(a, dims.len())).collect::<Result<_, _>>()?,
        None => (0..dims.len()).collect(),
    };
    let given = if sizes.is_empty() { scales.len() } else { sizes.len() };
    if given != axes.len() {
        return invalid(format!("{given} sizes or scales for {} axes", axes.len()));
    }
    let mut ratios: Vec<f64> = (0..axes.len())
        .map(|i| if sizes.is_empty() { scales[i] } else { sizes[i] / dims[axes[i]] as f64 })
        .collect();
    let policy = l.node.text("keep_aspect_ratio_policy", "stretch")?;
    let mut targets: Vec<f64> = (0..axes.len())
        .map(|i| if sizes.is_empty() { (dims[axes[i]] as f64 * scales[i]).floor() } else { sizes[i] })
        .collect();
    if !sizes.is_empty() && policy != "stretch" {
        let pick = match policy {
            "not_larger" => ratios.iter().copied().fold(f64::INFINITY, f64::min),
            "not_smaller" => ratios.iter().copied().fold(0.0, f64::max),
            other => return invalid(format!("keep_aspect_ratio_policy {other:?}")),
        };
        for i in 0..axes.len() {
            ratios[i] = pick;
            targets[i] = (pick * dims[axes[i]] as f64).round();
        }
    }
    let region = |i: usize| match roi.len() == 2 * axes.len() {
        true => (roi[i], roi[axes.len() + i]),
        false => (0.0, 1.0),
    };
    let wanted = (0..axes.len()).map(|i| {
        let (from, to) = (dims[axes[i]], targets[i].max(0.0) as usize);
        let natural = from as f64 * ratios[i];
        (axes[i], AxisRequest { from, to, scale: ratios[i], natural, region: region(i) })
    });
    let wanted: Vec<(usize, AxisRequest)> = wanted.collect();
    apply(l, &request, &wanted)
}

fn upsample(l: &mut Lowering<'_>) -> Lowered {
    let dims = l.dims(0)?;
    let mut request = Request::read(l)?;
    request.coordinates = "asymmetric".to_owned();
    request.nearest = "floor".to_owned();
    if request.mode == Mode::Cubic {
        return unsupported("cubic upsampling");
    }
    let scales = match l.node.floats_opt("scales")? {
        Some(scales) => scales,
        None => l.known(1).and_then(|v: Value| v.floats())?,
    };
    if scales.len() != dims.len() {
        return invalid(format!("{} scales for {} axes", scales.len(), dims.len()));
    }
    let axis = |i: usize| {
        let (from, natural) = (dims[i], dims[i] as f64 * scales[i]);
        (i, AxisRequest { from, to: natural.floor() as usize, scale: scales[i], natural, region: (0.0, 1.0) })
    };
    let wanted: Vec<(usize, AxisRequest)> = (0..dims.len()).map(axis).collect();
    apply(l, &request, &wanted)
}
