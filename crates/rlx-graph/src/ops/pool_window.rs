//! Pooling over windows of images.

use crate::attrs::{attr_enum, op_struct};
use crate::eval::{from_f64, from_i64, known_dims, to_f64, to_i64};
use crate::graph::{Graph, GraphError};
use crate::ids::ValueId;
use crate::op::{Cost, EvalError, InferCx, InferError, OpDef, Props, op_boilerplate};
use crate::ops::transpose::Transpose;
use crate::window::{Axis, Layout, Windows, all_positive, images, known_positions, per_axis, permuted};
use rlx_tensor::{DType, Dim, Shape, Tensor};

attr_enum! {
    /// What stands for a window.
    pub enum WindowPool {
        /// Its largest element; NaN if any is NaN.
        Max = "max",
        /// The mean of its elements.
        Mean = "mean",
        /// The p-th root of the sum of the p-th powers of their magnitudes.
        Lp = "lp",
    }
}

op_struct! {
    /// The elements of a window of each channel combined into one.
    ///
    /// Operand `x [batch, channels, spatial..]` (`[batch, spatial.., channels]` if `channels_last`). Result: as x with positions of
    /// the window for its spatial dims; then, if `indices`, where each largest element stands, I64: of the elements in row-major
    /// order of `[batch, channels, spatial..]`, the spatial axes reversed if `column_major`; of equal ones the first.
    pub struct PoolWindow = "pool_window" {
        /// How.
        kind: WindowPool,
        /// Elements of the window, for each spatial axis.
        window: Vec<usize>,
        /// Elements from one position of the window to the next.
        strides: Vec<usize>,
        /// Elements from one element of the window to the next.
        dilations: Vec<usize>,
        /// Elements in front of each spatial axis.
        before: Vec<Dim>,
        /// Elements behind each spatial axis.
        after: Vec<Dim>,
        /// A last position that reaches past the end counts, if it starts before the elements behind.
        ceil: bool,
        /// Elements added at the ends count, as zeros, in a mean.
        count_added: bool,
        /// The power of `lp`.
        power: f64,
        /// There is a second result.
        indices: bool,
        /// Indices count spatial axes first to last.
        column_major: bool,
        /// Channels are the last axis rather than the second.
        channels_last: bool,
    }
}

impl PoolWindow {
    /// A window at each position, without elements added, channels in front.
    pub fn plain(kind: WindowPool, window: &[usize]) -> Self {
        let axes = window.len();
        Self {
            kind,
            window: window.to_vec(),
            strides: vec![1; axes],
            dilations: vec![1; axes],
            before: vec![Dim::Known(0); axes],
            after: vec![Dim::Known(0); axes],
            ceil: false,
            count_added: false,
            power: 2.0,
            indices: false,
            column_major: false,
            channels_last: false,
        }
    }

    fn layout(&self) -> Layout {
        Layout { channels_last: self.channels_last }
    }

    fn axis<'a>(&'a self, axis: usize, size: &'a Dim) -> Axis<'a> {
        let (before, after) = (&self.before[axis], &self.after[axis]);
        let (stride, dilation) = (self.strides[axis], self.dilations[axis]);
        Axis { size, stride, dilation, before, after, ceil: self.ceil }
    }

    fn sizes(&self) -> Vec<Dim> {
        self.window.iter().map(|&d| Dim::Known(d)).collect()
    }

    fn windows(&self, extents: &[usize]) -> Result<Windows, EvalError> {
        let sizes = self.sizes();
        let axes: Vec<(Axis<'_>, usize)> =
            sizes.iter().enumerate().map(|(i, size)| (self.axis(i, size), extents[i])).collect();
        Ok(Windows {
            positions: known_positions(&axes)?,
            extents: extents.to_vec(),
            sizes: self.window.clone(),
            strides: self.strides.clone(),
            dilations: self.dilations.clone(),
            before: known_dims(&self.before)?,
            after: known_dims(&self.after)?,
        })
    }

    /// Where the largest elements stand: of each plane and position, the element within the plane; none for an empty window.
    fn largest<T: Copy>(planes: &[T], windows: &Windows, above: impl Fn(T, T) -> bool) -> Vec<Option<usize>> {
        let (elements, count) = (windows.extents.iter().product::<usize>(), windows.count());
        let planes: Vec<&[T]> = planes.chunks(elements.max(1)).collect();
        let mut best = vec![None; planes.len() * count];
        windows.visit(|_, position, element| {
            for (index, plane) in planes.iter().enumerate() {
                let best = &mut best[index * count + position];
                if best.is_none_or(|b| above(plane[element], plane[b])) {
                    *best = Some(element);
                }
            }
        });
        best
    }

    fn combined(&self, x: &[f64], windows: &Windows) -> Vec<f64> {
        let (elements, count) = (windows.extents.iter().product::<usize>(), windows.count());
        let planes: Vec<&[f64]> = x.chunks(elements.max(1)).collect();
        let mut sums = vec![0.0; planes.len() * count];
        let mut counts = vec![0usize; count];
        windows.visit(|_, position, element| {
            counts[position] += 1;
            for (index, plane) in planes.iter().enumerate() {
                let value = plane[element];
                sums[index * count + position] +=
                    if self.kind == WindowPool::Lp { value.abs().powf(self.power) } else { value };
            }
        });
        if self.count_added {
            counts = windows.padded_counts();
        }
        let finish = |(i, sum): (usize, f64)| match self.kind {
            WindowPool::Lp => sum.powf(1.0 / self.power),
            _ => sum / counts[i % count] as f64,
        };
        sums.into_iter().enumerate().map(finish).collect()
    }

    /// Positions of largest elements as the second result counts them.
    fn numbered(&self, best: &[Option<usize>], windows: &Windows) -> Vec<i64> {
        let (elements, count) = (windows.extents.iter().product::<usize>(), windows.count());
        let own = crate::eval::strides(&windows.extents);
        let place = |element: usize| {
            if !self.column_major {
                return element;
            }
            let mut step = 1;
            let mut at = 0;
            for (stride, extent) in own.iter().zip(&windows.extents) {
                at += element / stride % extent * step;
                step *= extent;
            }
            at
        };
        let number = |(i, best): (usize, &Option<usize>)| match best {
            Some(element) => (i / count * elements + place(*element)) as i64,
            None => -1,
        };
        best.iter().enumerate().map(number).collect()
    }
}

impl OpDef for PoolWindow {
    op_boilerplate!();

    fn infer(&self, _cx: &mut InferCx, inputs: &[&Shape]) -> Result<Vec<Shape>, InferError> {
        InferError::arity(1, inputs)?;
        let axes = images(inputs, 0)?;
        let found = inputs[0].dtype();
        if !found.is_float() && (!found.is_int() || self.kind != WindowPool::Max) {
            return Err(InferError::DType { operand: 0, expected: "a float (or integer)".into(), found });
        }
        if self.indices && self.kind != WindowPool::Max {
            let reason = format!("{} has none", self.kind.name());
            return Err(InferError::Attribute { name: "indices", reason });
        }
        all_positive("window", &self.window, axes)?;
        all_positive("strides", &self.strides, axes)?;
        all_positive("dilations", &self.dilations, axes)?;
        per_axis("before", self.before.len(), axes)?;
        per_axis("after", self.after.len(), axes)?;
        let (x, sizes) = (inputs[0].dims(), self.sizes());
        let spatial = self.layout().spatial(x).iter().zip(&sizes).enumerate();
        let positions = spatial.map(|(i, (extent, size))| self.axis(i, size).positions(extent));
        let positions: Vec<Dim> = positions.collect::<Result<_, _>>()?;
        let dims = self.layout().dims(&x[0], &x[self.layout().channels(x.len())], &positions);
        let mut shapes = vec![Shape::from_dims(dims.clone(), found)];
        if self.indices {
            shapes.push(Shape::from_dims(dims, DType::I64));
        }
        Ok(shapes)
    }

    fn reference(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>, EvalError> {
        let (x, layout) = (inputs[0], self.layout());
        let (rank, dtype) = (x.dims().len(), x.dtype());
        let windows = self.windows(layout.spatial(x.dims()))?;
        let channels = x.dims()[layout.channels(rank)];
        let front = Layout { channels_last: false }.dims(&x.dims()[0], &channels, &windows.positions);
        let dims = layout.dims(&x.dims()[0], &channels, &windows.positions);
        let (to_front, back) = (layout.permutation(rank, true), layout.permutation(rank, false));
        let elements = windows.extents.iter().product::<usize>();
        let pick = |best: &[Option<usize>]| -> Vec<Option<usize>> {
            let plane = |i: usize| i / windows.count() * elements;
            best.iter().enumerate().map(|(i, b)| b.map(|b| plane(i) + b)).collect()
        };
        if self.kind != WindowPool::Max {
            let planes = permuted(&to_f64(x)?, x.dims(), &to_front);
            let combined = permuted(&self.combined(&planes, &windows), &front, &back);
            return Ok(vec![from_f64(&dims, dtype, &combined)?]);
        }
        let (best, value) = if dtype.is_int() {
            let planes = permuted(&to_i64(x)?, x.dims(), &to_front);
            let best = Self::largest(&planes, &windows, |a, b| a > b);
            let values: Vec<i64> = pick(&best).iter().map(|b| b.map_or(i64::MIN, |b| planes[b])).collect();
            (best, from_i64(&dims, dtype, &permuted(&values, &front, &back))?)
        } else {
            let planes = permuted(&to_f64(x)?, x.dims(), &to_front);
            let best =
                Self::largest(&planes, &windows, |a: f64, b: f64| a > b || (a.is_nan() && !b.is_nan()));
            let of = |b: &Option<usize>| b.map_or(f64::NEG_INFINITY, |b| planes[b]);
            let values: Vec<f64> = pick(&best).iter().map(of).collect();
            (best, from_f64(&dims, dtype, &permuted(&values, &front, &back))?)
        };
        let mut results = vec![value];
        if self.indices {
            let numbers = permuted(&self.numbered(&best, &windows), &front, &back);
            results.push(from_i64(&dims, DType::I64, &numbers)?);
        }
        Ok(results)
    }

    fn props(&self) -> Props {
        Props { composite: self.channels_last, ..Props::default() }
    }

    fn cost(&self, inputs: &[&Shape], outputs: &[&Shape]) -> Cost {
        let taps: usize = self.window.iter().product();
        Cost::with_flops(outputs[0].elements() * Dim::Known(taps), inputs, outputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Option<Result<Vec<ValueId>, GraphError>> {
        if !self.channels_last {
            return None;
        }
        let rank = graph.shape(inputs[0]).rank();
        let mut expand = || {
            let perm = self.layout().permutation(rank, true);
            let x = graph.add_one(Transpose { perm }, inputs)?;
            let results = graph.add(PoolWindow { channels_last: false, ..self.clone() }, &[x])?;
            let perm = self.layout().permutation(rank, false);
            let back = |y: &ValueId| graph.add_one(Transpose { perm: perm.clone() }, &[*y]);
            results.iter().map(back).collect()
        };
        Some(expand())
    }
}
