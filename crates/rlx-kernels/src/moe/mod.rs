//! Mixture of experts: routing, grouping of rows by expert, weighted combination.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};
use crate::math::exp;
use crate::rank::top_of_row;

/// How weights come from logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// Softmax over all experts, then the largest `k`; `renormalise` makes them add up to 1.
    SoftmaxThenTop {
        /// Whether weights are divided by their sum.
        renormalise: bool,
    },
    /// The largest `k` logits, then softmax over them.
    TopThenSoftmax,
}

/// Arguments of routing; tile `r` is row `r`. Experts of a row descend by weight, ties to the lowest number.
#[derive(Clone, Copy, Debug)]
pub struct RouteArgs {
    /// Router logits, rows of `experts`.
    pub logits: *const f32,
    /// Elements between logit rows.
    pub logits_stride: usize,
    /// Experts.
    pub experts: usize,
    /// Experts per row, 1 to `experts`.
    pub k: usize,
    /// How weights come from logits.
    pub routing: Routing,
    /// `k` weights per row.
    pub weights: *mut f32,
    /// `k` expert numbers per row.
    pub chosen: *mut i32,
}

/// Arguments of grouping, one tile: a counting sort of the `rows * k` assignments by expert, rows ascending within one.
#[derive(Clone, Copy, Debug)]
pub struct GroupArgs {
    /// `rows * k` expert numbers.
    pub chosen: *const i32,
    /// Rows.
    pub rows: usize,
    /// Experts per row.
    pub k: usize,
    /// Experts.
    pub experts: usize,
    /// `experts + 1`: where the group of each expert starts.
    pub starts: *mut i32,
    /// `rows * k`: the row of each place of the grouped order, for a row gather.
    pub row_of_place: *mut i32,
    /// `rows * k`: the place of each assignment `row * k + rank`, for the combination.
    pub place_of: *mut i32,
}

/// Arguments of the combination; tile `r` is row `r`: `out = residual + sum over ranks of weight * y[place]`, one
/// accumulator per element from zero, fused, in rank order.
#[derive(Clone, Copy, Debug)]
pub struct CombineArgs {
    /// Results in grouped order, rows of `cols`.
    pub y: *const f32,
    /// Elements between rows of `y`.
    pub y_stride: usize,
    /// As routing left them.
    pub weights: *const f32,
    /// As grouping left them.
    pub place_of: *const i32,
    /// Experts per row.
    pub k: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Added last; null for none.
    pub residual: *const f32,
    /// Elements between residual rows.
    pub residual_stride: usize,
    /// Output rows; may be `residual` itself.
    pub out: *mut f32,
    /// Elements between output rows.
    pub out_stride: usize,
}

/// Instances of routing.
pub static ROUTE: Rows<RouteArgs> = Row::all_of::<RouteF32>();
/// Instances of grouping.
pub static GROUP: Rows<GroupArgs> = Row::all_of::<GroupRows>();
/// Instances of the combination.
pub static COMBINE: Rows<CombineArgs> = Row::all_of::<CombineF32>();

/// Routing for `isa`.
pub fn route_entry(isa: Isa) -> Option<Entry<RouteArgs>> {
    select(&ROUTE, isa)
}

/// Grouping for `isa`.
pub fn group_entry(isa: Isa) -> Option<Entry<GroupArgs>> {
    select(&GROUP, isa)
}

/// The combination for `isa`.
pub fn combine_entry(isa: Isa) -> Option<Entry<CombineArgs>> {
    select(&COMBINE, isa)
}

struct RouteF32;

impl Kernel for RouteF32 {
    type Args = RouteArgs;
    const OP: &'static str = "moe_route";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &RouteArgs, tile: usize) {
        // SAFETY: the caller guarantees the row and the outputs.
        unsafe {
            let logits = args.logits.add(tile * args.logits_stride);
            let weights = args.weights.add(tile * args.k);
            top_of_row(s, logits, args.experts, args.k, weights, args.chosen.add(tile * args.k));
            // Softmax keeps the order of logits, so the chosen logits give the weights either way.
            let top = *weights;
            let whole = match args.routing {
                Routing::SoftmaxThenTop { renormalise: false } => {
                    let mut sum = s.zero();
                    for i in (0..args.experts).step_by(LANES) {
                        let left = args.experts - i;
                        let e = exp(s, s.sub(s.load_to(logits.add(i), left), s.splat(top)));
                        sum = s.add(sum, s.select(s.first(left.min(LANES)), e, s.zero()));
                    }
                    Some(s.reduce_add(sum))
                }
                _ => None,
            };
            let mut sum = 0.0;
            for i in (0..args.k).step_by(LANES) {
                let left = args.k - i;
                let e = exp(s, s.sub(s.load_to(weights.add(i), left), s.splat(top)));
                sum += s.reduce_add(s.select(s.first(left.min(LANES)), e, s.zero()));
                s.store_to(weights.add(i), left, e);
            }
            let divisor = whole.unwrap_or(sum);
            for i in 0..args.k {
                *weights.add(i) /= divisor;
            }
        }
    }
}

struct GroupRows;

impl Kernel for GroupRows {
    type Args = GroupArgs;
    const OP: &'static str = "moe_group";
    const DTYPES: &'static str = "i32";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &GroupArgs, _tile: usize) {
        let n = args.rows * args.k;
        // SAFETY: the caller guarantees the arrays; chosen experts are below `experts`.
        unsafe {
            args.starts.write_bytes(0, args.experts + 1);
            for i in 0..n {
                *args.starts.add(*args.chosen.add(i) as usize + 1) += 1;
            }
            for e in 0..args.experts {
                *args.starts.add(e + 1) += *args.starts.add(e);
            }
            // Placing moves each start to the next group's; they are moved back below.
            for i in 0..n {
                let start = args.starts.add(*args.chosen.add(i) as usize);
                *args.place_of.add(i) = *start;
                *args.row_of_place.add(*start as usize) = (i / args.k) as i32;
                *start += 1;
            }
            for e in (1..=args.experts).rev() {
                *args.starts.add(e) = *args.starts.add(e - 1);
            }
            *args.starts = 0;
        }
    }
}

struct CombineF32;

impl Kernel for CombineF32 {
    type Args = CombineArgs;
    const OP: &'static str = "moe_combine";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &CombineArgs, tile: usize) {
        // SAFETY: the caller guarantees the rows, weights and places.
        unsafe {
            for i in (0..args.cols).step_by(LANES) {
                let left = args.cols - i;
                let mut acc = s.zero();
                for rank in 0..args.k {
                    let place = *args.place_of.add(tile * args.k + rank) as usize;
                    let weight = s.splat(*args.weights.add(tile * args.k + rank));
                    acc = s.fma(weight, s.load_to(args.y.add(place * args.y_stride + i), left), acc);
                }
                if !args.residual.is_null() {
                    acc = s.add(s.load_to(args.residual.add(tile * args.residual_stride + i), left), acc);
                }
                s.store_to(args.out.add(tile * args.out_stride + i), left, acc);
            }
        }
    }
}
