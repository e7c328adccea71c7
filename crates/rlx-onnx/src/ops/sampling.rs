//! Images sampled at points that operands name.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::value::{Value, from_floats};
use rlx_graph::eval::strides;

type Evaluated = Result<Vec<Value>, Refusal>;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("GridSample", grid_sample),
    Row::host("RoiAlign", roi_align),
    Row::host("MaxRoiPool", max_roi_pool),
];

/// What is seen outside an image.
#[derive(Clone, Copy, PartialEq)]
enum Outside {
    Zeros,
    Border,
    Reflection,
}

/// A plane of any rank and how it is read.
struct Plane<'a> {
    values: &'a [f64],
    extents: &'a [usize],
    strides: &'a [usize],
    outside: Outside,
    align_corners: bool,
}

/// A coordinate turned back at both ends of a range until it is inside.
fn reflect(at: f64, low: f64, high: f64) -> f64 {
    let range = high - low;
    if range <= 0.0 {
        return 0.0;
    }
    let distance = (at - low).abs();
    let (turns, rest) = ((distance / range).floor(), distance % range);
    if turns as i64 % 2 == 0 { low + rest } else { high - rest }
}

impl Plane<'_> {
    /// The place of a coordinate along an axis; none where nothing is seen.
    fn place(&self, axis: usize, at: f64) -> Option<usize> {
        let last = self.extents[axis] as f64 - 1.0;
        let at = match self.outside {
            Outside::Zeros => at,
            Outside::Border => at.clamp(0.0, last),
            Outside::Reflection if self.align_corners => reflect(at, 0.0, last).clamp(0.0, last),
            Outside::Reflection => reflect(at, -0.5, last + 0.5).clamp(0.0, last),
        };
        (at >= 0.0 && at <= last).then_some(at as usize)
    }

    /// A coordinate of the grid as one of the plane.
    fn unfold(&self, axis: usize, at: f64) -> f64 {
        let extent = self.extents[axis] as f64;
        if self.align_corners { (at + 1.0) / 2.0 * (extent - 1.0) } else { ((at + 1.0) * extent - 1.0) / 2.0 }
    }

    /// A coordinate before its neighbours are looked at.
    fn settle(&self, axis: usize, at: f64) -> f64 {
        let last = self.extents[axis] as f64 - 1.0;
        let (low, high) = if self.align_corners { (0.0, last) } else { (-0.5, last + 0.5) };
        match self.outside {
            _ if at >= low && at <= high => at,
            Outside::Zeros => at,
            Outside::Border => at.clamp(0.0, last),
            Outside::Reflection => reflect(at, low, high),
        }
    }

    /// The sum over all combinations of each axis's weighted elements.
    fn combine(&self, taps: &[Vec<(f64, f64)>]) -> f64 {
        let mut sum = 0.0;
        let count: usize = taps.iter().map(Vec::len).product();
        for mut index in 0..count {
            let (mut at, mut weight) = (Some(0), 1.0);
            for (axis, own) in taps.iter().enumerate() {
                let (place, part) = own[index % own.len()];
                index /= own.len();
                weight *= part;
                at = at.zip(self.place(axis, place)).map(|(a, p)| a + p * self.strides[axis]);
            }
            if let Some(at) = at {
                sum += weight * self.values[at];
            }
        }
        sum
    }
}

fn cubic_taps(at: f64) -> Vec<(f64, f64)> {
    let a = -0.75;
    let (base, t) = (at.floor(), at - at.floor());
    let near = |t: f64| ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0;
    let far = |t: f64| ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a;
    vec![(base - 1.0, far(t + 1.0)), (base, near(t)), (base + 1.0, near(1.0 - t)), (base + 2.0, far(2.0 - t))]
}

fn grid_sample(h: &Host<'_>) -> Evaluated {
    let (dims, grid_dims) = (h.dims(0)?.to_vec(), h.dims(1)?.to_vec());
    let axes = dims.len().saturating_sub(2);
    if axes == 0
        || grid_dims.len() != dims.len()
        || grid_dims.last() != Some(&axes)
        || grid_dims[0] != dims[0]
    {
        return invalid(format!("a grid {grid_dims:?} over {dims:?}"));
    }
    let outside = match h.node.text("padding_mode", "zeros")? {
        "zeros" => Outside::Zeros,
        "border" => Outside::Border,
        "reflection" => Outside::Reflection,
        other => return invalid(format!("padding_mode {other:?}")),
    };
    let mode = h.node.text("mode", "linear")?;
    let align_corners = h.node.flag("align_corners", false)?;
    let (x, grid) = (h.floats(0)?, h.floats(1)?);
    let extents = &dims[2..];
    let (own, elements) = (strides(extents), extents.iter().product::<usize>());
    let points: usize = grid_dims[1..=axes].iter().product();
    let mut y = Vec::with_capacity(dims[0] * dims[1] * points);
    for plane_index in 0..dims[0] * dims[1] {
        let values = &x[plane_index * elements..(plane_index + 1) * elements];
        let plane = Plane { values, extents, strides: &own, outside, align_corners };
        let image = plane_index / dims[1];
        for point in 0..points {
            let named = &grid[(image * points + point) * axes..][..axes];
            // A point names the last axis first.
            let taps = (0..axes).map(|axis| {
                let at = plane.unfold(axis, named[axes - 1 - axis]);
                Ok(match mode {
                    "nearest" => vec![(plane.settle(axis, at.round_ties_even()), 1.0)],
                    "linear" | "bilinear" => {
                        let at = plane.settle(axis, at);
                        let (base, t) = (at.floor(), at - at.floor());
                        vec![(base, 1.0 - t), (base + 1.0, t)]
                    }
                    "cubic" | "bicubic" => cubic_taps(plane.settle(axis, at)),
                    other => return invalid(format!("mode {other:?}")),
                })
            });
            let taps = taps.collect::<Result<Vec<_>, Refusal>>()?;
            y.push(plane.combine(&taps));
        }
    }
    let result: Vec<usize> = dims[..2].iter().chain(&grid_dims[1..=axes]).copied().collect();
    Ok(vec![from_floats(h.element(0)?, &result, &y)?])
}

/// The value between the elements of a plane; its edge just outside, zero beyond.
fn beside(plane: &[f64], [height, width]: [usize; 2], y: f64, x: f64) -> [(f64, f64); 4] {
    if y < -1.0 || x < -1.0 || y > height as f64 || x > width as f64 {
        return [(0.0, 0.0); 4];
    }
    let split = |at: f64, extent: usize| {
        let at = at.max(0.0);
        let low = at as usize;
        if low + 1 >= extent { (extent - 1, extent - 1, 0.0) } else { (low, low + 1, at - low as f64) }
    };
    let ((top, bottom, dy), (left, right, dx)) = (split(y, height), split(x, width));
    let at = |row: usize, column: usize| plane[row * width + column];
    [
        (at(top, left), (1.0 - dy) * (1.0 - dx)),
        (at(top, right), (1.0 - dy) * dx),
        (at(bottom, left), dy * (1.0 - dx)),
        (at(bottom, right), dy * dx),
    ]
}

fn roi_align(h: &Host<'_>) -> Evaluated {
    let (dims, roi_dims) = (h.dims(0)?.to_vec(), h.dims(1)?.to_vec());
    if dims.len() != 4 || roi_dims.len() != 2 || roi_dims[1] != 4 {
        return invalid(format!("regions {roi_dims:?} of {dims:?}"));
    }
    let (x, rois, images) = (h.floats(0)?, h.floats(1)?, h.ints(2)?);
    let default = if h.node.opset >= 16 { "half_pixel" } else { "output_half_pixel" };
    let offset =
        if h.node.text("coordinate_transformation_mode", default)? == "half_pixel" { 0.5 } else { 0.0 };
    let largest = h.node.text("mode", "avg")? == "max";
    let (rows, columns) =
        (h.node.int("output_height", 1)?.max(0) as usize, h.node.int("output_width", 1)?.max(0) as usize);
    let ratio = h.node.int("sampling_ratio", 0)?;
    let scale = h.node.float("spatial_scale", 1.0)?;
    let [height, width] = [dims[2], dims[3]];
    let mut y = Vec::with_capacity(roi_dims[0] * dims[1] * rows * columns);
    for roi in 0..roi_dims[0] {
        let at = |i: usize| rois[roi * 4 + i] * scale - offset;
        let (left, top) = (at(0), at(1));
        let mut size = (at(3) - top, at(2) - left);
        if offset == 0.0 {
            size = (size.0.max(1.0), size.1.max(1.0));
        }
        let bin = (size.0 / rows as f64, size.1 / columns as f64);
        let samples = |bin: f64| if ratio > 0 { ratio as usize } else { bin.ceil().max(0.0) as usize };
        let (down, across) = (samples(bin.0), samples(bin.1));
        let Some(image) = usize::try_from(images[roi]).ok().filter(|&i| i < dims[0]) else {
            return invalid(format!("image {} of {}", images[roi], dims[0]));
        };
        for channel in 0..dims[1] {
            let plane = &x[(image * dims[1] + channel) * height * width..][..height * width];
            for cell in 0..rows * columns {
                let (row, column) = ((cell / columns) as f64, (cell % columns) as f64);
                let mut found: Option<f64> = None;
                for sample in 0..down * across {
                    let (i, j) = ((sample / across) as f64, (sample % across) as f64);
                    let sy = top + row * bin.0 + (i + 0.5) * bin.0 / down as f64;
                    let sx = left + column * bin.1 + (j + 0.5) * bin.1 / across as f64;
                    let parts = beside(plane, [height, width], sy, sx);
                    let value = match largest {
                        true => parts.iter().map(|(v, w)| v * w).fold(f64::NEG_INFINITY, f64::max),
                        false => parts.iter().map(|(v, w)| v * w).sum(),
                    };
                    found = Some(match found {
                        None => value,
                        Some(so_far) if largest => so_far.max(value),
                        Some(so_far) => so_far + value,
                    });
                }
                let count = if largest { 1.0 } else { (down * across).max(1) as f64 };
                y.push(found.unwrap_or(0.0) / count);
            }
        }
    }
    Ok(vec![from_floats(h.element(0)?, &[roi_dims[0], dims[1], rows, columns], &y)?])
}

fn max_roi_pool(h: &Host<'_>) -> Evaluated {
    let (dims, roi_dims) = (h.dims(0)?.to_vec(), h.dims(1)?.to_vec());
    let shape = h.node.ints_opt("pooled_shape")?.unwrap_or_default();
    let (&[rows, columns], true) = (shape.as_slice(), dims.len() == 4 && roi_dims.get(1) == Some(&5)) else {
        return invalid(format!("regions {roi_dims:?} of {dims:?} pooled to {shape:?}"));
    };
    let scale = h.node.float("spatial_scale", 1.0)?;
    let (x, rois) = (h.floats(0)?, h.floats(1)?);
    let [height, width] = [dims[2], dims[3]];
    let mut y = Vec::new();
    for roi in rois.chunks_exact(5) {
        let image = (roi[0].max(0.0) as usize).min(dims[0].saturating_sub(1));
        let [left, top, right, bottom] = [1, 2, 3, 4].map(|i: usize| (roi[i] * scale).round() as i64);
        let bin = |from: i64, to: i64, cells: i64| (to - from + 1).max(1) as f64 / cells as f64;
        let (down, across) = (bin(top, bottom, rows), bin(left, right, columns));
        let span = |cell: i64, bin: f64, from: i64, extent: usize| {
            let start = ((cell as f64 * bin).floor() as i64 + from).clamp(0, extent as i64) as usize;
            let end = (((cell + 1) as f64 * bin).ceil() as i64 + from).clamp(0, extent as i64) as usize;
            start..end
        };
        for channel in 0..dims[1] {
            let plane = &x[(image * dims[1] + channel) * height * width..][..height * width];
            for row in 0..rows {
                for column in 0..columns {
                    let (ys, xs) = (span(row, down, top, height), span(column, across, left, width));
                    let cells = ys.flat_map(|y| xs.clone().map(move |x| plane[y * width + x]));
                    let best = cells.fold(None, |best: Option<f64>, v| Some(best.map_or(v, |b| b.max(v))));
                    y.push(best.unwrap_or(0.0));
                }
            }
        }
    }
    let result = [roi_dims[0], dims[1], rows.max(0) as usize, columns.max(0) as usize];
    Ok(vec![from_floats(h.element(0)?, &result, &y)?])
}
