use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::*;

struct Probe {
    input: Vec<f32>,
    output: std::cell::RefCell<Vec<u32>>,
}

struct ProbeKernel;

impl Kernel for ProbeKernel {
    type Args = Probe;
    const OP: &'static str = "probe";
    const DTYPES: &'static str = "f32";

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Probe, _tile: usize) {
        let mut out = args.output.borrow_mut();
        for window in args.input.windows(48).step_by(7) {
            // SAFETY: a window holds 48 values, the buffers of `record` 16.
            unsafe {
                let a = s.load(window.as_ptr());
                let b = s.load(window.as_ptr().add(16));
                let c = s.load(window.as_ptr().add(32));
                record_arithmetic(s, a, b, c, &mut out);
                record_memory(s, a, window, &mut out);
            }
        }
    }
}

#[inline(always)]
fn record<S: Simd>(s: S, v: S::V, out: &mut Vec<u32>) {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: the array holds 16 values.
    unsafe { s.store(lanes.as_mut_ptr(), v) };
    out.extend(lanes.iter().map(|x| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }));
}

#[inline(always)]
fn record_arithmetic<S: Simd>(s: S, a: S::V, b: S::V, c: S::V, out: &mut Vec<u32>) {
    let one = s.splat(1.0);
    for v in [s.add(a, b), s.sub(a, b), s.mul(a, b), s.div(a, b), s.fma(a, b, c), s.fnma(a, b, c)] {
        record(s, v, out);
    }
    for v in [s.min(a, b), s.max(a, b), s.sqrt(a), s.round(a), s.floor(a), s.ceil(a), s.trunc(a), s.abs(a)] {
        record(s, v, out);
    }
    let masks = [s.lt(a, b), s.le(a, b), s.eq(a, b), s.is_nan(a), s.first(5), s.and(s.lt(a, b), s.first(9))];
    for m in masks {
        record(s, s.select(m, one, s.zero()), out);
        record(s, s.select(s.or(m, s.lt(b, c)), one, s.zero()), out);
        out.push(u32::from(s.any(m)));
    }
    let (i, j) = (s.bits(a), s.bits(b));
    let ints = [
        s.iadd(i, j),
        s.isub(i, j),
        s.iand(i, j),
        s.ior(i, j),
        s.ixor(i, j),
        s.ishl(i, 5),
        s.ishr(i, 7),
        s.isar(i, 9),
        s.to_int(s.max(s.min(a, s.splat(1e6)), s.splat(-1e6))),
    ];
    for v in ints {
        record(s, s.to_float(v), out);
    }
    record(s, s.select(s.igt(i, j), one, s.zero()), out);
    record(s, s.select(s.ieq(i, j), one, s.zero()), out);
    for v in [s.neg(a), s.copysign(a, b)] {
        record(s, v, out);
    }
    for x in [s.reduce_add(a), s.reduce_max(a), s.reduce_min(a)] {
        out.push(if x.is_nan() { 1 } else { x.to_bits() });
    }
    let mut rows = [a; 16];
    for (k, row) in rows.iter_mut().enumerate() {
        *row = s.add(s.mul(a, s.splat(k as f32)), b);
    }
    for v in s.transpose(rows) {
        record(s, v, out);
    }
}

#[inline(always)]
unsafe fn record_memory<S: Simd>(s: S, a: S::V, window: &[f32], out: &mut Vec<u32>) {
    for n in 0..=LANES {
        let mut floats = [7.0f32; LANES];
        let mut halves = [3u16; LANES];
        // SAFETY: every buffer and the window hold at least 16 values.
        unsafe {
            record(s, s.load_part(window.as_ptr(), n), out);
            s.store_part(floats.as_mut_ptr(), n, a);
            record(s, s.load(floats.as_ptr()), out);
            s.store_bf16_part(halves.as_mut_ptr(), n, a);
            record(s, s.load_bf16_part(halves.as_ptr(), n), out);
            record(s, s.load_bf16(halves.as_ptr()), out);
            s.store_f16_part(halves.as_mut_ptr(), n, a);
            record(s, s.load_f16_part(halves.as_ptr(), n), out);
            record(s, s.load_f16(halves.as_ptr()), out);
            s.store_bf16(halves.as_mut_ptr(), a);
            record(s, s.load_bf16(halves.as_ptr()), out);
            s.store_f16(halves.as_mut_ptr(), a);
            record(s, s.load_f16(halves.as_ptr()), out);
        }
    }
    let ints: Vec<i32> = window.iter().map(|x| x.to_bits() as i32).collect();
    let mut copy = [0i32; LANES];
    // SAFETY: both buffers hold at least 16 values.
    unsafe { s.istore(copy.as_mut_ptr(), s.iload(ints.as_ptr())) };
    out.extend(copy.iter().map(|x| *x as u32));
    let bytes: Vec<i8> = ints.iter().map(|x| (x >> 20) as i8).collect();
    // SAFETY: as above.
    unsafe { s.istore(copy.as_mut_ptr(), s.iload_i8(bytes.as_ptr())) };
    out.extend(copy.iter().map(|x| *x as u32));
}

fn samples() -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MIN_POSITIVE,
        1e-45,
        -3e-42,
        f32::MAX,
        65504.0,
        65520.0,
        6e-8,
        1.003_906_2,
        1e-7,
    ];
    let mut state = 0x1234_5678u32;
    let mut out = Vec::new();
    for i in 0..600 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.push(match i % 5 {
            0 => special[(state >> 16) as usize % special.len()],
            1 => f32::from_bits(state),
            _ => ((state >> 8) as f32 / 16_777_216.0 - 0.5) * 40.0,
        });
    }
    out
}

#[test]
fn every_token_gives_the_bits_of_the_scalar_token() {
    let mut expected: Option<Vec<u32>> = None;
    for isa in Isa::available() {
        let probe = Probe { input: samples(), output: Vec::new().into() };
        let run = entry::<ProbeKernel>(isa).expect("an available instruction set has an instance");
        // SAFETY: the instruction set is available, and the probe's kernel stays inside its own buffers.
        unsafe { run(&probe, 0) };
        let got = probe.output.into_inner();
        let want = expected.get_or_insert_with(|| got.clone());
        assert_eq!(got.len(), want.len());
        let differs = got.iter().zip(want.iter()).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{isa} differs from scalar");
    }
}

#[test]
fn half_conversions_round_trip_and_round_to_even() {
    for bits in 0..=u16::MAX {
        let wide = f16_to_f32(bits);
        if wide.is_nan() {
            assert!(f16_to_f32(f32_to_f16(wide)).is_nan());
        } else {
            assert_eq!(f32_to_f16(wide), bits);
        }
        let wide = bf16_to_f32(bits);
        if wide.is_nan() {
            assert!(bf16_to_f32(f32_to_bf16(wide)).is_nan());
        } else {
            assert_eq!(f32_to_bf16(wide), bits);
        }
    }
    assert_eq!(f32_to_f16(65519.9), 0x7bff);
    assert_eq!(f32_to_f16(65520.0), 0x7c00);
    assert_eq!(f32_to_f16(1.0 + 1.0 / 2048.0), 0x3c00);
    assert_eq!(f32_to_f16(1.0 + 3.0 / 2048.0), 0x3c02);
    assert_eq!(f32_to_bf16(1.0 + 1.0 / 256.0), 0x3f80);
    assert_eq!(f32_to_bf16(1.0 + 3.0 / 256.0), 0x3f82);
    assert_eq!(f32_to_bf16(1e-45), 0);
}

#[test]
fn names_parse_back_and_a_wrong_name_lists_the_right_ones() {
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse::<Isa>(), Ok(isa));
    }
    assert_eq!("AVX512".parse::<Isa>(), Ok(Isa::Avx512));
    let message = "sse9".parse::<Isa>().unwrap_err().to_string();
    assert!(message.contains("sse9") && message.contains("avx2"), "{message}");
}

#[test]
fn the_detected_set_is_the_last_available_one() {
    let available = Isa::available();
    assert_eq!(available.first(), Some(&Isa::Scalar));
    assert_eq!(available.last(), Some(&Isa::detect()));
}

#[test]
fn selection_falls_back_to_a_slower_row() {
    let rows = [Row::of::<ProbeKernel>(Isa::Scalar)];
    assert!(select(&rows, Isa::Avx512).is_some());
    assert_eq!(rows[0].name(), "probe_f32_scalar");
}
