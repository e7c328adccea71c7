use std::cell::RefCell;
use std::marker::PhantomData;

use super::*;
use crate::isa::{Isa, Kernel, LANES, entry};

trait Function: 'static {
    fn vector<S: Simd>(s: S, x: S::V) -> S::V;
}

struct Apply<F>(PhantomData<F>);

impl<F: Function> Kernel for Apply<F> {
    type Args = RefCell<Vec<f32>>;
    const OP: &'static str = "apply";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Self::Args, _tile: usize) {
        for chunk in args.borrow_mut().chunks_mut(LANES) {
            // SAFETY: a chunk holds `chunk.len() <= 16` values.
            unsafe {
                let y = F::vector(s, s.load_part(chunk.as_ptr(), chunk.len()));
                s.store_part(chunk.as_mut_ptr(), chunk.len(), y);
            }
        }
    }
}

macro_rules! functions {
    ($($name:ident = $f:ident;)*) => {$(
        struct $name;
        impl Function for $name {
            #[inline(always)]
            fn vector<S: Simd>(s: S, x: S::V) -> S::V {
                $f(s, x)
            }
        }
    )*};
}

functions! {
    Exp = exp;
    Exp2 = exp2;
    Log = log;
    Tanh = tanh;
    Erf = erf;
    Sigmoid = sigmoid;
    GeluErf = gelu_erf;
    GeluTanh = gelu_tanh;
    GeluQuick = gelu_quick;
    Silu = silu;
    Relu = relu;
}

fn apply<F: Function>(isa: Isa, input: &[f32]) -> Vec<f32> {
    let values = RefCell::new(input.to_vec());
    let run = entry::<Apply<F>>(isa).expect("an available instruction set has an instance");
    // SAFETY: the instruction set is available; the kernel stays inside the vector.
    unsafe { run(&values, 0) };
    values.into_inner()
}

/// Every 997th bit pattern and a fine grid.
fn samples() -> Vec<f32> {
    let mut out: Vec<f32> =
        (0..=u32::MAX / 997).map(|i| f32::from_bits(i * 997)).filter(|x| !x.is_nan()).collect();
    out.extend((-400_000..400_000).map(|i| i as f32 / 4000.0));
    out
}

fn ulp_error(got: f32, want: f64) -> f64 {
    let rounded = want as f32;
    if got == rounded || (got.is_nan() && rounded.is_nan()) {
        return 0.0;
    }
    if !rounded.is_finite() || !got.is_finite() {
        return if want.abs() > f64::from(f32::MAX) && got.abs() == f32::MAX { 1.0 } else { f64::INFINITY };
    }
    let magnitude = rounded.abs().max(f32::MIN_POSITIVE);
    let ulp = f64::from(f32::from_bits(magnitude.to_bits() + 1)) - f64::from(magnitude);
    (f64::from(got) - want).abs() / ulp
}

fn worst<F: Function>(isa: Isa, input: &[f32], exact: fn(f64) -> f64) -> (f64, f32) {
    let got = apply::<F>(isa, input);
    let mut worst = (0.0, 0.0);
    for (x, y) in input.iter().zip(&got) {
        let error = ulp_error(*y, exact(f64::from(*x)));
        if error > worst.0 {
            worst = (error, *x);
        }
    }
    worst
}

fn check<F: Function>(name: &str, limit: f64, exact: fn(f64) -> f64) {
    let input = samples();
    let isa = Isa::detect();
    let (error, at) = worst::<F>(isa, &input, exact);
    println!("{name}: {error:.3} ulp at {at:e}");
    assert!(error <= limit, "{name} on {isa}: {error} ulp at {at:e}, limit {limit}");
}

fn tanh64(x: f64) -> f64 {
    x.tanh()
}

/// erf by its series for small arguments and by the continued fraction of erfc elsewhere.
fn erf64(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return 1f64.copysign(x);
    }
    let value = if a < 3.0 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-19 {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut f = 0.0;
        for k in (1..200).rev() {
            f = f64::from(k) / 2.0 / (a + f);
        }
        1.0 - (-a * a).exp() / ((a + f) * std::f64::consts::PI.sqrt())
    };
    value.copysign(x)
}

#[test]
fn exp_stays_within_its_error() {
    check::<Exp>("exp", 1.5, f64::exp);
}

#[test]
fn exp2_stays_within_its_error_and_is_exact_at_whole_numbers() {
    let isa = Isa::detect();
    let input: Vec<f32> = samples().into_iter().filter(|x| *x <= 127.0).collect();
    let (error, at) = worst::<Exp2>(isa, &input, f64::exp2);
    println!("exp2: {error:.3} ulp at {at:e}");
    assert!(error <= 1.5, "{error} ulp at {at:e}");
    let whole: Vec<f32> = (-149..128).map(|n| n as f32).collect();
    for isa in Isa::available() {
        for (n, y) in whole.iter().zip(apply::<Exp2>(isa, &whole)) {
            assert_eq!(f64::from(y), f64::from(*n).exp2());
        }
        let y = apply::<Exp2>(isa, &[f32::NEG_INFINITY, -0.0, -1e30, f32::NAN]);
        assert_eq!(&y[..3], &[0.0, 1.0, 0.0]);
        assert!(y[3].is_nan());
    }
}

#[test]
fn log_stays_within_its_error() {
    check::<Log>("log", 2.0, f64::ln);
}

#[test]
fn tanh_stays_within_its_error() {
    check::<Tanh>("tanh", 3.0, tanh64);
}

#[test]
fn sigmoid_stays_within_its_error() {
    check::<Sigmoid>("sigmoid", 3.0, |x| if x < -700.0 { 0.0 } else { 1.0 / (1.0 + (-x).exp()) });
}

#[test]
fn erf_stays_within_its_error() {
    check::<Erf>("erf", 3.0, erf64);
}

#[test]
fn activations_are_close_to_their_definitions() {
    let input: Vec<f32> = (-120_000..120_000).map(|i| i as f32 / 8000.0).collect();
    let close = |got: Vec<f32>, exact: fn(f64) -> f64| {
        for (x, y) in input.iter().zip(got) {
            let want = exact(f64::from(*x));
            let error = (f64::from(y) - want).abs();
            let limit = 4.0 * f64::from(f32::EPSILON) * f64::from(x.abs()).max(f64::from(f32::MIN_POSITIVE));
            assert!(error <= limit, "{x}: {y} against {want}");
        }
    };
    let isa = Isa::detect();
    close(apply::<GeluErf>(isa, &input), |x| 0.5 * x * (1.0 + erf64(x / std::f64::consts::SQRT_2)));
    close(apply::<GeluTanh>(isa, &input), |x| {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
    });
    close(apply::<GeluQuick>(isa, &input), |x| x / (1.0 + (-1.702 * x).exp()));
    close(apply::<Silu>(isa, &input), |x| x / (1.0 + (-x).exp()));
    close(apply::<Relu>(isa, &input), |x| x.max(0.0));
}

#[test]
fn special_values() {
    let input = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -0.0, 89.0, -104.0, -1e30, 1e30, 1e-45];
    for isa in Isa::available() {
        let y = apply::<Exp>(isa, &input);
        assert_eq!(y[0].to_bits(), 0);
        assert_eq!(y[1], f32::INFINITY);
        assert!(y[2].is_nan());
        assert_eq!(&y[3..], &[1.0, 1.0, f32::INFINITY, 0.0, 0.0, f32::INFINITY, 1.0]);
        let y = apply::<Tanh>(isa, &input);
        assert_eq!(&y[..2], &[-1.0, 1.0]);
        assert!(y[2].is_nan() && y[4].is_sign_negative());
        assert_eq!(y[9], 1e-45);
        let y = apply::<Erf>(isa, &input);
        assert_eq!(&y[..2], &[-1.0, 1.0]);
        assert!(y[2].is_nan() && y[4].is_sign_negative());
        let y = apply::<Sigmoid>(isa, &input);
        assert_eq!(&y[..2], &[0.0, 1.0]);
        assert!(y[2].is_nan());
        let y = apply::<Log>(isa, &input);
        assert!(y[0].is_nan() && y[2].is_nan() && y[6].is_nan());
        assert_eq!(&[y[1], y[3], y[4]], &[f32::INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY]);
        assert!(apply::<Relu>(isa, &input)[2].is_nan());
    }
}

fn agree<F: Function>(name: &str) {
    agree_up_to::<F>(name, f32::INFINITY);
}

fn agree_up_to<F: Function>(name: &str, limit: f32) {
    let mut input: Vec<f32> = (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(21_473))).collect();
    input.extend((-20_000..20_000).map(|i| i as f32 / 200.0));
    input.retain(|x| *x <= limit);
    let want = apply::<F>(Isa::Scalar, &input);
    for isa in Isa::available() {
        for (i, (a, b)) in apply::<F>(isa, &input).iter().zip(&want).enumerate() {
            let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(same, "{name} {isa} at {}: {a} against {b}", input[i]);
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    agree::<Exp>("exp");
    agree_up_to::<Exp2>("exp2", 127.0);
    agree::<Log>("log");
    agree::<Tanh>("tanh");
    agree::<Erf>("erf");
    agree::<Sigmoid>("sigmoid");
    agree::<GeluErf>("gelu_erf");
    agree::<GeluTanh>("gelu_tanh");
    agree::<GeluQuick>("gelu_quick");
    agree::<Silu>("silu");
}
