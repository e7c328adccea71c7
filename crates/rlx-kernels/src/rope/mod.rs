//! Rotary position embedding: a table of angles, then the rotation of heads.

#[cfg(test)]
mod tests;

use crate::isa::{Entry, Isa, Kernel, LANES, Row, Rows, Simd, select};

/// Arguments of the angle table. Row `r` holds `half` cosines, then `half` sines, of `positions[r] * inv_freq[i]`: the
/// product rounded to f32, cosine and sine evaluated in f64, times `factor`, rounded to f32. Tile `r` is row `r`.
#[derive(Clone, Copy, Debug)]
pub struct AngleArgs {
    /// Absolute position of each row.
    pub positions: *const i32,
    /// `half` inverse frequencies.
    pub inv_freq: *const f32,
    /// Half the rotated elements of a head.
    pub half: usize,
    /// Factor of every cosine and sine (attention scaling); 1 for none.
    pub factor: f32,
    /// Rows of `2 * half`.
    pub table: *mut f32,
}

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Element `i` with `i + rotary_dim / 2`.
    Halves,
    /// Element `2 i` with `2 i + 1`.
    Neighbours,
}

/// Arguments of the rotation: `y1 = x1 cos - x2 sin`, `y2 = x2 cos + x1 sin`, each a product then a fused step.
#[derive(Clone, Copy, Debug)]
pub struct RopeArgs {
    /// Rows of `heads * head_dim`.
    pub x: *const f32,
    /// Elements between input rows.
    pub x_stride: usize,
    /// Output rows: `x` itself with the same stride, or apart from it.
    pub y: *mut f32,
    /// Elements between output rows.
    pub y_stride: usize,
    /// Angles as [`AngleArgs`] leaves them, rows of `rotary_dim`.
    pub table: *const f32,
    /// Rows.
    pub rows: usize,
    /// Heads per row.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rotated elements of a head, even, at most `head_dim`; the others are copied.
    pub rotary_dim: usize,
    /// Which elements turn together.
    pub pairing: Pairing,
    /// Rows of one tile.
    pub rows_per_tile: usize,
}

impl RopeArgs {
    /// Number of tiles.
    pub const fn tiles(&self) -> usize {
        self.rows.div_ceil(self.rows_per_tile)
    }
}

/// Instances of the angle table.
pub static ANGLES: Rows<AngleArgs> = Row::all_of::<AnglesF32>();
/// Instances of the rotation.
pub static ROPE: Rows<RopeArgs> = Row::all_of::<RopeF32>();

/// The angle table for `isa`.
pub fn angles_entry(isa: Isa) -> Option<Entry<AngleArgs>> {
    select(&ANGLES, isa)
}

/// The rotation for `isa`.
pub fn rope_entry(isa: Isa) -> Option<Entry<RopeArgs>> {
    select(&ROPE, isa)
}

struct AnglesF32;

impl Kernel for AnglesF32 {
    type Args = AngleArgs;
    const OP: &'static str = "rope_angles";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(_s: S, args: &AngleArgs, tile: usize) {
        // SAFETY: the caller guarantees the positions, the frequencies and the row.
        unsafe {
            let position = *args.positions.add(tile) as f32;
            let row = args.table.add(tile * 2 * args.half);
            for i in 0..args.half {
                let (sin, cos) = f64::from(position * *args.inv_freq.add(i)).sin_cos();
                *row.add(i) = (cos * f64::from(args.factor)) as f32;
                *row.add(args.half + i) = (sin * f64::from(args.factor)) as f32;
            }
        }
    }
}

struct RopeF32;

impl Kernel for RopeF32 {
    type Args = RopeArgs;
    const OP: &'static str = "rope";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &RopeArgs, tile: usize) {
        let first = tile * args.rows_per_tile;
        for row in first..args.rows.min(first + args.rows_per_tile) {
            for head in 0..args.heads {
                // SAFETY: the caller guarantees the rows and the table.
                unsafe {
                    let x = args.x.add(row * args.x_stride + head * args.head_dim);
                    let y = args.y.add(row * args.y_stride + head * args.head_dim);
                    let angles = args.table.add(row * args.rotary_dim);
                    match args.pairing {
                        Pairing::Halves => turn_halves(s, x, y, angles, args.rotary_dim / 2),
                        Pairing::Neighbours => turn_neighbours(x, y, angles, args.rotary_dim / 2),
                    }
                    if !std::ptr::eq(x, y) {
                        let rest = args.head_dim - args.rotary_dim;
                        y.add(args.rotary_dim).copy_from_nonoverlapping(x.add(args.rotary_dim), rest);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn turn_halves<S: Simd>(s: S, x: *const f32, y: *mut f32, angles: *const f32, half: usize) {
    // SAFETY: the caller guarantees `2 * half` elements of each.
    unsafe {
        for i in (0..half).step_by(LANES) {
            let left = half - i;
            let (cos, sin) = (s.load_to(angles.add(i), left), s.load_to(angles.add(half + i), left));
            let (a, b) = (s.load_to(x.add(i), left), s.load_to(x.add(half + i), left));
            s.store_to(y.add(i), left, s.fnma(b, sin, s.mul(a, cos)));
            s.store_to(y.add(half + i), left, s.fma(a, sin, s.mul(b, cos)));
        }
    }
}

#[inline(always)]
unsafe fn turn_neighbours(x: *const f32, y: *mut f32, angles: *const f32, half: usize) {
    // SAFETY: the caller guarantees `2 * half` elements of each.
    unsafe {
        for i in 0..half {
            let (cos, sin) = (*angles.add(i), *angles.add(half + i));
            let (a, b) = (*x.add(2 * i), *x.add(2 * i + 1));
            *y.add(2 * i) = (-b).mul_add(sin, a * cos);
            *y.add(2 * i + 1) = a.mul_add(sin, b * cos);
        }
    }
}
