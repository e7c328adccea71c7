use crate::isa::{LANES, Simd};
use crate::math;

/// A stream of f32 values: contiguous, or one repeated.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) at: *const f32,
    pub(super) repeated: bool,
}

impl Source {
    /// # Safety
    /// `left` values from `i` on are readable, or the one that is repeated.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, i: usize, left: usize) -> S::V {
        // SAFETY: the caller guarantees the memory.
        unsafe { if self.repeated { s.splat(*self.at) } else { s.load_to(self.at.add(i), left) } }
    }
}

macro_rules! unary_ops {
    ($s:ident, $x:ident; $($(#[$doc:meta])* $name:ident, $text:literal => $body:expr;)*) => {
        /// An operation on one f32 value.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Unary { $($(#[$doc])* $name,)* }

        impl Unary {
            /// All operations.
            pub const ALL: &'static [Unary] = &[$(Unary::$name,)*];

            /// The name in graphs and reports.
            pub const fn name(self) -> &'static str {
                match self { $(Unary::$name => $text,)* }
            }
        }

        /// # Safety
        /// `a` is readable and `to` writable for `n` values.
        #[inline(always)]
        pub(super) unsafe fn apply_unary<S: Simd>($s: S, op: Unary, a: Source, to: *mut f32, n: usize) {
            match op {
                $(Unary::$name => for i in (0..n).step_by(LANES) {
                    // SAFETY: the caller guarantees `n` values of each.
                    unsafe {
                        let $x = a.load($s, i, n - i);
                        $s.store_to(to.add(i), n - i, $body);
                    }
                },)*
            }
        }
    };
}

macro_rules! binary_ops {
    ($s:ident, $x:ident, $y:ident; $($(#[$doc:meta])* $name:ident, $text:literal => $body:expr;)*) => {
        /// An operation on two f32 values. Comparisons and logic give 1 or 0.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Binary { $($(#[$doc])* $name,)* }

        impl Binary {
            /// All operations.
            pub const ALL: &'static [Binary] = &[$(Binary::$name,)*];

            /// The name in graphs and reports.
            pub const fn name(self) -> &'static str {
                match self { $(Binary::$name => $text,)* }
            }
        }

        /// # Safety
        /// `a` and `b` are readable and `to` writable for `n` values.
        #[inline(always)]
        pub(super) unsafe fn apply_binary<S: Simd>($s: S, op: Binary, a: Source, b: Source, to: *mut f32, n: usize) {
            match op {
                $(Binary::$name => for i in (0..n).step_by(LANES) {
                    // SAFETY: the caller guarantees `n` values of each.
                    unsafe {
                        let $x = a.load($s, i, n - i);
                        let $y = b.load($s, i, n - i);
                        $s.store_to(to.add(i), n - i, $body);
                    }
                },)*
            }
        }
    };
}

unary_ops! { s, x;
    /// The value itself.
    Copy, "copy" => x;
    /// Negation.
    Neg, "neg" => s.neg(x);
    /// Magnitude.
    Abs, "abs" => s.abs(x);
    /// -1, 0 or 1; NaN stays.
    Sign, "sign" => s.select(s.or(s.eq(x, s.zero()), s.is_nan(x)), x, s.copysign(s.splat(1.0), x));
    /// `1 / x`.
    Recip, "recip" => s.div(s.splat(1.0), x);
    /// `x * x`.
    Square, "square" => s.mul(x, x);
    /// Square root.
    Sqrt, "sqrt" => s.sqrt(x);
    /// `1 / sqrt(x)`.
    Rsqrt, "rsqrt" => s.div(s.splat(1.0), s.sqrt(x));
    /// `e^x`.
    Exp, "exp" => math::exp(s, x);
    /// Natural logarithm.
    Log, "log" => math::log(s, x);
    /// Sine, in f64.
    Sin, "sin" => math::by_lane(s, x, f64::sin);
    /// Cosine, in f64.
    Cos, "cos" => math::by_lane(s, x, f64::cos);
    /// Hyperbolic tangent.
    Tanh, "tanh" => math::tanh(s, x);
    /// Error function.
    Erf, "erf" => math::erf(s, x);
    /// `1 / (1 + e^-x)`.
    Sigmoid, "sigmoid" => math::sigmoid(s, x);
    /// `max(x, 0)`.
    Relu, "relu" => math::relu(s, x);
    /// GELU by the error function.
    GeluErf, "gelu_erf" => math::gelu_erf(s, x);
    /// GELU by tanh.
    GeluTanh, "gelu_tanh" => math::gelu_tanh(s, x);
    /// `x * sigmoid(1.702 x)`.
    GeluQuick, "gelu_quick" => math::gelu_quick(s, x);
    /// `x * sigmoid(x)`.
    Silu, "silu" => math::silu(s, x);
    /// To nearest, ties to even.
    Round, "round" => s.round(x);
    /// Downwards.
    Floor, "floor" => s.floor(x);
    /// Upwards.
    Ceil, "ceil" => s.ceil(x);
    /// Towards zero.
    Trunc, "trunc" => s.trunc(x);
    /// 1 for zero, else 0.
    Not, "not" => truth(s, s.eq(x, s.zero()));
    /// 1 for NaN, else 0.
    IsNan, "is_nan" => truth(s, s.is_nan(x));
}

binary_ops! { s, x, y;
    /// `a + b`.
    Add, "add" => s.add(x, y);
    /// `a - b`.
    Sub, "sub" => s.sub(x, y);
    /// `a * b`.
    Mul, "mul" => s.mul(x, y);
    /// `a / b`.
    Div, "div" => s.div(x, y);
    /// The smaller; NaN if either is.
    Min, "min" => s.select(s.is_nan(x), x, s.min(x, y));
    /// The larger; NaN if either is.
    Max, "max" => s.select(s.is_nan(x), x, s.max(x, y));
    /// `a^b`, in f64.
    Pow, "pow" => math::pow(s, x, y);
    /// `a == b`.
    Equal, "equal" => truth(s, s.eq(x, y));
    /// `a != b`.
    NotEqual, "not_equal" => truth(s, s.not(s.eq(x, y)));
    /// `a < b`.
    Less, "less" => truth(s, s.lt(x, y));
    /// `a <= b`.
    LessEqual, "less_equal" => truth(s, s.le(x, y));
    /// `a > b`.
    Greater, "greater" => truth(s, s.lt(y, x));
    /// `a >= b`.
    GreaterEqual, "greater_equal" => truth(s, s.le(y, x));
    /// Both nonzero.
    And, "and" => truth(s, s.and(nonzero(s, x), nonzero(s, y)));
    /// Either nonzero.
    Or, "or" => truth(s, s.or(nonzero(s, x), nonzero(s, y)));
    /// One nonzero.
    Xor, "xor" => truth(s, s.or(s.and(nonzero(s, x), s.not(nonzero(s, y))), s.and(s.not(nonzero(s, x)), nonzero(s, y))));
}

#[inline(always)]
fn truth<S: Simd>(s: S, m: S::M) -> S::V {
    s.select(m, s.splat(1.0), s.zero())
}

#[inline(always)]
fn nonzero<S: Simd>(s: S, x: S::V) -> S::M {
    s.not(s.eq(x, s.zero()))
}

/// `to = a * b + c` with one rounding.
///
/// # Safety
/// The sources are readable and `to` writable for `n` values.
#[inline(always)]
pub(super) unsafe fn apply_fma<S: Simd>(s: S, [a, b, c]: [Source; 3], to: *mut f32, n: usize) {
    for i in (0..n).step_by(LANES) {
        // SAFETY: the caller guarantees `n` values of each.
        unsafe {
            let y = s.fma(a.load(s, i, n - i), b.load(s, i, n - i), c.load(s, i, n - i));
            s.store_to(to.add(i), n - i, y);
        }
    }
}

/// `to = mask != 0 ? a : b`.
///
/// # Safety
/// The sources are readable and `to` writable for `n` values.
#[inline(always)]
pub(super) unsafe fn apply_select<S: Simd>(s: S, [mask, a, b]: [Source; 3], to: *mut f32, n: usize) {
    for i in (0..n).step_by(LANES) {
        // SAFETY: the caller guarantees `n` values of each.
        unsafe {
            let m = nonzero(s, mask.load(s, i, n - i));
            s.store_to(to.add(i), n - i, s.select(m, a.load(s, i, n - i), b.load(s, i, n - i)));
        }
    }
}
