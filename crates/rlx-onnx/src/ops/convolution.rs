//! Convolutions, plain, transposed and of integers; windows gathered and deformed.

use super::{Row, integer};
use crate::error::{Refusal, invalid};
use crate::lower::{Host, Lowering};
use crate::model::NodeDef;
use crate::value::{Value, from_floats};
use rlx_graph::ValueId;
use rlx_graph::eval::strides;
use rlx_graph::ops::conv::Conv;
use rlx_graph::ops::conv_transpose::ConvTranspose;
use rlx_graph::ops::transpose::Transpose;
use rlx_tensor::{DType, Dim, Tensor};

type Lowered = Result<Vec<ValueId>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::lower("Conv", conv),
    Row::lower("ConvInteger", integer::conv_integer),
    Row::lower("QLinearConv", integer::qlinear_conv),
    Row::lower("ConvTranspose", conv_transpose),
    Row::host("DeformConv", deform_conv),
    Row::host("Col2Im", col2im),
];

/// How a window moves over spatial axes.
pub struct Geometry {
    /// Elements of the window.
    pub window: Vec<usize>,
    /// Elements from one position to the next.
    pub strides: Vec<usize>,
    /// Elements from one element of the window to the next.
    pub dilations: Vec<usize>,
    /// Elements in front of each axis.
    pub before: Vec<usize>,
    /// Elements behind each axis.
    pub after: Vec<usize>,
}

/// An attribute of one size for each spatial axis.
pub fn sizes(node: &NodeDef, name: &str, axes: usize, default: usize) -> Result<Vec<usize>, Refusal> {
    let Some(values) = node.ints_opt(name)? else { return Ok(vec![default; axes]) };
    let known: Option<Vec<usize>> =
        values.iter().map(|&v| i32::try_from(v).ok().and_then(|v| usize::try_from(v).ok())).collect();
    match known {
        Some(known) if known.len() == axes => Ok(known),
        _ => invalid(format!("attribute {name:?} must be {axes} sizes below 2^31, found {values:?}")),
    }
}

impl Geometry {
    /// From a node's attributes, over an operand of these spatial extents.
    pub fn read(node: &NodeDef, extents: &[usize], window: Option<&[usize]>) -> Result<Geometry, Refusal> {
        let axes = extents.len();
        let window = match (window, node.ints_opt("kernel_shape")?) {
            (Some(window), _) => window.to_vec(),
            (None, Some(_)) => sizes(node, "kernel_shape", axes, 1)?,
            (None, None) => return invalid("attribute \"kernel_shape\" is missing"),
        };
        if window.len() != axes {
            return invalid(format!("a window of {} axes over {axes}", window.len()));
        }
        let (strides, dilations) = (sizes(node, "strides", axes, 1)?, sizes(node, "dilations", axes, 1)?);
        if strides.contains(&0) || dilations.contains(&0) {
            return invalid("strides and dilations must be at least 1");
        }
        let auto = node.text("auto_pad", "NOTSET")?;
        let (mut before, mut after) = (vec![0; axes], vec![0; axes]);
        match auto {
            "VALID" => {}
            "SAME_UPPER" | "SAME_LOWER" => {
                for axis in 0..axes {
                    let span = window[axis].saturating_sub(1) * dilations[axis] + 1;
                    let positions = extents[axis].div_ceil(strides[axis]);
                    let reach = positions.saturating_sub(1) * strides[axis] + span;
                    let total = reach.saturating_sub(extents[axis]);
                    let small = total / 2;
                    let upper = auto == "SAME_UPPER";
                    before[axis] = if upper { small } else { total - small };
                    after[axis] = total - before[axis];
                }
            }
            _ => {
                let pads = sizes(node, "pads", 2 * axes, 0)?;
                before.copy_from_slice(&pads[..axes]);
                after.copy_from_slice(&pads[axes..]);
            }
        }
        Ok(Geometry { window, strides, dilations, before, after })
    }

    /// Sizes as dims.
    pub fn dims(values: &[usize]) -> Vec<Dim> {
        values.iter().map(|&v| Dim::Known(v)).collect()
    }
}

fn groups(node: &NodeDef) -> Result<usize, Refusal> {
    let groups = node.int("group", 1)?;
    usize::try_from(groups).ok().filter(|&g| g > 0).map_or_else(|| invalid(format!("{groups} groups")), Ok)
}

/// The convolution of a node whose images and weights are operands `x` and `w`.
pub fn conv_op(l: &Lowering<'_>, x: usize, w: usize, bias: bool) -> Result<Conv, Refusal> {
    let (images, weights) = (l.dims(x)?, l.dims(w)?);
    if images.len() < 3 || weights.len() != images.len() {
        return invalid(format!("images of rank {}, weights of rank {}", images.len(), weights.len()));
    }
    let window = Geometry::read(l.node, &images[2..], Some(&weights[2..]))?;
    Ok(Conv {
        strides: window.strides,
        dilations: window.dilations,
        before: Geometry::dims(&window.before),
        after: Geometry::dims(&window.after),
        groups: groups(l.node)?,
        bias,
        ..Conv::plain(images.len() - 2)
    })
}

fn conv(l: &mut Lowering<'_>) -> Lowered {
    let op = conv_op(l, 0, 1, l.has(2))?;
    let codes = op.groups == 1 && op.strides.len() <= 2;
    let weight = if codes { l.value_beside(1, 0)? } else { l.value(1)? };
    let mut inputs = vec![l.value(0)?, weight];
    inputs.extend(l.optional(2)?);
    Ok(vec![l.add(op, &inputs)?])
}

fn conv_transpose(l: &mut Lowering<'_>) -> Lowered {
    let (images, weights) = (l.dims(0)?, l.dims(1)?);
    if images.len() < 3 || weights.len() != images.len() {
        return invalid(format!("images of rank {}, weights of rank {}", images.len(), weights.len()));
    }
    let (axes, node) = (images.len() - 2, l.node);
    let (strides, dilations) = (sizes(node, "strides", axes, 1)?, sizes(node, "dilations", axes, 1)?);
    if strides.contains(&0) || dilations.contains(&0) {
        return invalid("strides and dilations must be at least 1");
    }
    let extra = sizes(node, "output_padding", axes, 0)?;
    let pads = sizes(node, "pads", 2 * axes, 0)?;
    let wanted = node.ints_opt("output_shape")?;
    let auto = node.text("auto_pad", "NOTSET")?;
    let mut op = ConvTranspose {
        strides: strides.clone(),
        dilations: dilations.clone(),
        before: Vec::new(),
        after: Vec::new(),
        groups: groups(node)?,
        bias: l.has(2),
    };
    for axis in 0..axes {
        let span = weights[2 + axis].saturating_sub(1) * dilations[axis] + 1;
        let full = (strides[axis] * images[2 + axis].saturating_sub(1) + span + extra[axis]) as i64;
        let target = match (&wanted, auto) {
            (Some(wanted), _) => wanted.get(wanted.len().saturating_sub(axes) + axis).copied(),
            (None, "SAME_UPPER" | "SAME_LOWER") => Some((images[2 + axis] * strides[axis]) as i64),
            _ => None,
        };
        let (before, after) = match target {
            // What the full result has more is cut; what it has less is added behind.
            Some(target) => {
                let total = (full - target).max(0);
                let before = if auto == "SAME_UPPER" { total / 2 } else { total - total / 2 };
                (before, full - target - before)
            }
            None if auto == "VALID" => (0, 0),
            None => (pads[axis] as i64, pads[axes + axis] as i64),
        };
        op.before.push(before);
        op.after.push(after - extra[axis] as i64);
    }
    if let Some(result) = by_phases(l, &op, &images, &weights)? {
        return Ok(vec![result]);
    }
    let mut inputs = vec![l.value(0)?, l.value(1)?];
    inputs.extend(l.optional(2)?);
    Ok(vec![l.add(op, &inputs)?])
}

/// Weights of all phases, zeros included, are at most this many times those of the window.
const MOST_PLACES: usize = 16;

/// A transposed convolution with known weights as a plain one. Elements of the result that stand `stride` apart see the same elements of
/// the window, so that each of these phases is a convolution; all of them are outputs of one, moved to their places afterwards.
fn by_phases(
    l: &mut Lowering<'_>,
    op: &ConvTranspose,
    images: &[usize],
    weights: &[usize],
) -> Result<Option<ValueId>, Refusal> {
    let axes = images.len() - 2;
    let (batch, channels, each) = (images[0], images[1], weights[1]);
    if weights.len() != images.len() || weights[0] != channels || !channels.is_multiple_of(op.groups) {
        return Ok(None);
    }
    let cut = op.before.iter().any(|&b| b < 0);
    let known = l.constant(1).filter(|_| axes <= 2 && !cut && !images.contains(&0) && !weights.contains(&0));
    let Some(known) = known.filter(|_| l.dtype(0).is_ok_and(|d| d == DType::F32)) else { return Ok(None) };
    let spans: Vec<usize> = (0..axes).map(|a| (weights[2 + a] - 1) * op.dilations[a] + 1).collect();
    let sizes: Vec<usize> = (0..axes).map(|a| spans[a].div_ceil(op.strides[a])).collect();
    let (mut positions, mut kept) = (Vec::new(), Vec::new());
    for axis in 0..axes {
        let reach = ((images[2 + axis] - 1) * op.strides[axis] + spans[axis]) as i64;
        let len = usize::try_from(reach - op.before[axis] - op.after[axis]);
        let Some(len) = len.ok().filter(|&len| len > 0) else { return Ok(None) };
        let end = op.before[axis] as usize + len;
        kept.push(len);
        positions.push(end.div_ceil(op.strides[axis]).max(images[2 + axis] + sizes[axis] - 1));
    }
    let taps: usize = weights[2..].iter().product();
    let phases = op.strides.iter().try_fold(1usize, |n, &stride| n.checked_mul(stride));
    let places = phases.and_then(|n| sizes.iter().try_fold(n, |n, &size| n.checked_mul(size)));
    // Steps far wider than the window are rows of zeros, one for each phase.
    if places.is_none_or(|n| n > MOST_PLACES * taps) {
        return Ok(None);
    }
    let phases: usize = op.strides.iter().product();
    let outputs = each * op.groups;
    let dims = [&[outputs * phases, channels / op.groups][..], &sizes].concat();
    let weight = l.derived(1, "phases", &dims, || {
        let values = known.floats()?;
        let to_phase = strides(&op.strides);
        let (to, from) = (strides(&dims), strides(weights));
        let mut turned = vec![0f32; dims.iter().product()];
        for (i, value) in turned.iter_mut().enumerate() {
            let (row, channel) = (i / to[0], i / to[1] % dims[1]);
            let (output, phase) = (row / phases, row % phases);
            let group = output / each;
            let mut at = (group * dims[1] + channel) * from[0] + output % each * from[1];
            let mut inside = true;
            for axis in 0..axes {
                let tap = sizes[axis] - 1 - i / to[2 + axis] % sizes[axis];
                let offset = phase / to_phase[axis] % op.strides[axis] + op.strides[axis] * tap;
                inside &= offset < spans[axis] && offset.is_multiple_of(op.dilations[axis]);
                at += offset / op.dilations[axis] * from[2 + axis];
            }
            if inside {
                *value = values[at] as f32;
            }
        }
        Ok(Tensor::from_slice(&dims, &turned)?)
    })?;
    let before: Vec<usize> = sizes.iter().map(|size| size - 1).collect();
    let after: Vec<usize> = (0..axes).map(|a| positions[a] - images[2 + a]).collect();
    let mut inputs = vec![l.value(0)?, weight];
    if let Some(bias) = l.optional(2)? {
        let bias = l.reshape(bias, &[outputs, 1])?;
        let bias = l.broadcast(bias, &[outputs, phases])?;
        inputs.push(l.reshape(bias, &[outputs * phases])?);
    }
    let plain = Conv {
        before: Geometry::dims(&before),
        after: Geometry::dims(&after),
        groups: op.groups,
        bias: op.bias,
        ..Conv::plain(axes)
    };
    let y = l.add(plain, &inputs)?;
    // [batch, outputs, phase of each axis, position of each axis]: the phase goes behind its position.
    let split = [&[batch, outputs][..], &op.strides, &positions].concat();
    let mut y = l.reshape(y, &split)?;
    let perm = [0, 1].into_iter().chain((0..axes).flat_map(|a| [2 + axes + a, 2 + a])).collect();
    y = l.add(Transpose { perm }, &[y])?;
    let whole: Vec<usize> = (0..axes).map(|a| positions[a] * op.strides[a]).collect();
    y = l.reshape(y, &[&[batch, outputs][..], &whole].concat())?;
    for axis in 0..axes {
        if (op.before[axis], kept[axis]) != (0, whole[axis]) {
            y = l.expand().slice(y, 2 + axis, op.before[axis] as usize, kept[axis])?;
        }
    }
    Ok(Some(y))
}

/// The value between elements of a plane; zero outside.
pub fn bilinear(plane: &[f64], extents: [usize; 2], y: f64, x: f64) -> f64 {
    let [height, width] = extents;
    let (top, left) = (y.floor(), x.floor());
    let at = |row: f64, column: f64| {
        let inside = row >= 0.0 && column >= 0.0 && row < height as f64 && column < width as f64;
        if inside { plane[row as usize * width + column as usize] } else { 0.0 }
    };
    let (dy, dx) = (y - top, x - left);
    at(top, left) * (1.0 - dy) * (1.0 - dx)
        + at(top, left + 1.0) * (1.0 - dy) * dx
        + at(top + 1.0, left) * dy * (1.0 - dx)
        + at(top + 1.0, left + 1.0) * dy * dx
}

fn deform_conv(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let (x_dims, w_dims, offset_dims) = (h.dims(0)?, h.dims(1)?, h.dims(2)?);
    if x_dims.len() != 4 || w_dims.len() != 4 || offset_dims.len() != 4 {
        return invalid("images, weights and offsets must have rank 4");
    }
    let window = Geometry::read(h.node, &x_dims[2..], Some(&w_dims[2..]))?;
    let (groups, parts) = (groups(h.node)?, h.node.int("offset_group", 1)?.max(1) as usize);
    let (x, w, offsets) = (h.floats(0)?, h.floats(1)?, h.floats(2)?);
    let bias = h.optional(3).map(Value::floats).transpose()?;
    let mask = h.optional(4).map(Value::floats).transpose()?;
    let [batch, channels, height, width] = [x_dims[0], x_dims[1], x_dims[2], x_dims[3]];
    let (outputs, each) = (w_dims[0], w_dims[1]);
    let (rows, columns) = (offset_dims[2], offset_dims[3]);
    let taps = window.window[0] * window.window[1];
    let (outputs_each, channels_each) = (outputs / groups, channels / parts);
    if each * groups != channels || offset_dims[1] != 2 * parts * taps || channels_each == 0 {
        return invalid("channels, groups and offsets do not fit each other");
    }
    let mut y = vec![0.0; batch * outputs * rows * columns];
    for (index, value) in y.iter_mut().enumerate() {
        let (image, output) = (index / (outputs * rows * columns), index / (rows * columns) % outputs);
        let (row, column) = (index / columns % rows, index % columns);
        let mut sum = bias.as_ref().map_or(0.0, |b| b[output]);
        for channel in 0..each {
            let source = output / outputs_each * each + channel;
            let plane = &x[(image * channels + source) * height * width..][..height * width];
            let part = source / channels_each;
            for tap in 0..taps {
                let (ky, kx) = (tap / window.window[1], tap % window.window[1]);
                let offset = |which: usize| {
                    let plane = (image * parts + part) * 2 * taps + 2 * tap + which;
                    offsets[(plane * rows + row) * columns + column]
                };
                let at_y = (row * window.strides[0] + ky * window.dilations[0]) as f64
                    - window.before[0] as f64
                    + offset(0);
                let at_x = (column * window.strides[1] + kx * window.dilations[1]) as f64
                    - window.before[1] as f64
                    + offset(1);
                let weight = w[(output * each + channel) * taps + tap];
                let masked = mask.as_ref().map_or(1.0, |m| {
                    m[(((image * parts + part) * taps + tap) * rows + row) * columns + column]
                });
                sum += weight * masked * bilinear(plane, [height, width], at_y, at_x);
            }
        }
        *value = sum;
    }
    Ok(vec![from_floats(h.element(0)?, &[batch, outputs, rows, columns], &y)?])
}

fn col2im(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let to_sizes = |values: Vec<i64>| values.iter().map(|&v| v.max(0) as usize).collect::<Vec<usize>>();
    let (extents, block) = (to_sizes(h.ints(1)?), to_sizes(h.ints(2)?));
    let window = Geometry::read(h.node, &extents, Some(&block))?;
    let dims = h.dims(0)?;
    let taps: usize = block.iter().product();
    if dims.len() != 3 || taps == 0 || !dims[1].is_multiple_of(taps) {
        return invalid(format!("columns {dims:?} do not fit a block of {taps}"));
    }
    let (batch, channels, count) = (dims[0], dims[1] / taps, dims[2]);
    let axes = extents.len();
    let positions: Vec<usize> = (0..axes)
        .map(|axis| {
            let span = (block[axis] - 1) * window.dilations[axis] + 1;
            let padded = extents[axis] + window.before[axis] + window.after[axis];
            padded.checked_sub(span).map_or(0, |room| room / window.strides[axis] + 1)
        })
        .collect();
    if positions.iter().product::<usize>() != count {
        return invalid(format!("{count} columns for {positions:?} positions"));
    }
    let (x, elements) = (h.floats(0)?, extents.iter().product::<usize>());
    let (own, of_position, of_tap) = (strides(&extents), strides(&positions), strides(&block));
    let mut y = vec![0.0; batch * channels * elements];
    for plane in 0..batch * channels {
        for tap in 0..taps {
            for position in 0..count {
                let mut at = Some(0);
                for axis in 0..axes {
                    let p = position / of_position[axis] % positions[axis];
                    let t = tap / of_tap[axis] % block[axis];
                    let padded = p * window.strides[axis] + t * window.dilations[axis];
                    let inside = padded.checked_sub(window.before[axis]).filter(|&i| i < extents[axis]);
                    at = at.zip(inside).map(|(a, i)| a + i * own[axis]);
                }
                if let Some(at) = at {
                    y[plane * elements + at] += x[(plane * taps + tap) * count + position];
                }
            }
        }
    }
    let dims: Vec<usize> = [batch, channels].into_iter().chain(extents).collect();
    Ok(vec![from_floats(h.element(0)?, &dims, &y)?])
}
