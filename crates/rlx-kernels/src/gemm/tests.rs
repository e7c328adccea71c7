use super::pack::widen;
use super::*;
use crate::isa::CpuFeatures;
use crate::isa::half::{bf16_to_f32, f32_to_bf16};

const TYPES: [WeightType; 3] = [WeightType::F32, WeightType::Bf16, WeightType::F16];

/// A weight type with the products formed of it, and the precision those belong to.
#[derive(Clone, Copy, Debug)]
struct Form {
    dtype: WeightType,
    products: Products,
}

impl Form {
    const F32: Form = Form { dtype: WeightType::F32, products: Products::F32 };

    /// All that this machine can form on an instruction set.
    fn all_of(isa: Isa) -> Vec<Form> {
        let wide = TYPES.map(|dtype| Form { dtype, products: Products::F32 });
        let rounded =
            [Products::Bf16Fma, Products::Bf16Dot].map(|products| Form { dtype: WeightType::Bf16, products });
        wide.into_iter().chain(rounded).filter(|form| form.products.is_available(isa)).collect()
    }

    fn rounds(self) -> bool {
        self.products != Products::F32
    }

    /// The products of rounded operands add the second of two k first.
    fn order(self, k: usize) -> Vec<usize> {
        if !self.rounds() {
            return (0..k).collect();
        }
        (0..k).map(|i| if i ^ 1 < k { i ^ 1 } else { i }).collect()
    }
}

/// Values in (-1, 1) from a counter, with a spread of exponents.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let value = |index: usize| {
        let mut h = (seed << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 29;
        h = h.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h ^= h >> 32;
        ((h >> 40) as f32 / (1 << 23) as f32 - 1.0) / (1 << (h & 7)) as f32
    };
    (0..len).map(value).collect()
}

/// The bytes of weights of a type, and the values they stand for.
fn weights(seed: u64, len: usize, dtype: WeightType) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut wide) = (Vec::new(), Vec::new());
    for value in values(seed, len) {
        let bits = match dtype {
            WeightType::F32 => value.to_bits(),
            WeightType::Bf16 => value.to_bits() >> 16,
            // Exponents of f16 run from -14; the fraction is cut.
            WeightType::Blocks(_) => unreachable!("dense types only"),
            WeightType::F16 => {
                let bits = value.to_bits();
                let exponent = ((bits >> 23) & 0xff).saturating_sub(112);
                (bits >> 16 & 0x8000) | (exponent << 10) | (bits >> 13 & 0x3ff)
            }
        };
        bytes.extend_from_slice(&bits.to_le_bytes()[..dtype.bytes()]);
        wide.push(widen(bits, dtype));
    }
    (bytes, wide)
}

fn part(bytes: &[u8], dtype: WeightType, n: usize, k: usize) -> WeightPart<'_> {
    WeightPart { bytes, dtype, n, k, order: WeightOrder::RowMajor }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// The accumulators the contract asks for, computed from the unpacked weights.
fn expected(form: Form, x: &[f32], x_stride: usize, m: usize, w: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(m * n);
    let operand = |x: f32| if form.rounds() { bf16_to_f32(f32_to_bf16(x)) } else { x };
    let order = form.order(k);
    for row in 0..m {
        for column in 0..n {
            let terms = order.iter().map(|&i| (operand(x[row * x_stride + i]), w[column * k + i]));
            out.push(terms.fold(0.0f32, |acc, (x, w)| x.mul_add(w, acc)));
        }
    }
    out
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    form: Form,
}

/// Runs a plain layer with odd strides and offsets; what lies between the rows must stay untouched.
fn run(isa: Isa, pool: &Pool, case: &Case, x: &[f32], w: &PackedMatrix) -> Vec<f32> {
    let kernel = LinearKernel::select(isa, w.layout(), case.form.products).expect("an available form");
    let stride = case.n + 3;
    let mut out = vec![7.5f32; case.m * stride + 1];
    let operands = LinearOperands {
        m: case.m,
        x: &x[1..],
        x_stride: case.k + 1,
        bias: None,
        residual: Residual::None,
        out: &mut out[1..],
        out_stride: stride,
        activation: Activation::None,
    };
    kernel.run(pool, w, operands).expect("valid operands");
    assert_eq!(out[0], 7.5);
    let rows = out[1..].chunks_exact(stride);
    assert!(rows.clone().all(|row| row[case.n..].iter().all(|&v| v == 7.5)));
    rows.flat_map(|row| row[..case.n].to_vec()).collect()
}

fn compare_with_contract(isa: Isa, pool: &Pool, case: &Case) {
    let &Case { m, n, k, form } = case;
    let x = values(1, 1 + m * (k + 1) + k);
    let (bytes, wide) = weights(2, n * k, form.dtype);
    let w = pack(&[part(&bytes, form.dtype, n, k)], false, isa, Precision::F32).expect("valid parts");
    let found = run(isa, pool, case, &x, &w);
    let wanted = expected(form, &x[1..], k + 1, m, &wide, n, k);
    assert_eq!(bits(&found), bits(&wanted), "{isa} {form:?} m {m} n {n} k {k}");
}

#[test]
fn every_instance_gives_the_contracts_bits() {
    let pool = Pool::new(1);
    for isa in Isa::available() {
        for form in Form::all_of(isa) {
            for m in 1..=33 {
                for k in [0, 1, 2, 3, 17] {
                    for n in [1, 15, 16, 31, 33, 70] {
                        compare_with_contract(isa, &pool, &Case { m, n, k, form });
                    }
                }
            }
            for n in 1..=70 {
                compare_with_contract(isa, &pool, &Case { m: 1 + n % 5, n, k: 19, form });
            }
            compare_with_contract(isa, &pool, &Case { m: 29, n: 130, k: 384, form });
        }
    }
}

#[test]
fn every_table_row_is_reached_and_complete() {
    for group in BLOCKS {
        let first = &group[0];
        let one: Vec<usize> = group.iter().filter(|row| row.panels == 1).map(|row| row.rows).collect();
        assert_eq!(one, (1..=one.len()).collect::<Vec<_>>(), "{}", first.name());
        assert!(group.iter().all(|row| row.serves(first.isa(), first.dtype, first.products)));
        for row in *group {
            assert!(row.rows * row.panels * panel_columns(row.isa()) <= MAX_ACCUMULATORS, "{}", row.name());
            if !row.is_available() {
                continue;
            }
            let layout = PackedLayout::new(row.dtype, 1024, 8, false, row.isa()).expect("a small layout");
            let kernel = LinearKernel::select(row.isa(), &layout, row.products).expect("an available row");
            let several = group.iter().any(|other| other.rows == row.rows && other.panels > row.panels);
            if !several {
                assert_eq!(kernel.name(row.rows), row.name());
            }
        }
    }
}

#[test]
fn a_row_alone_equals_the_row_among_others_for_any_thread_count() {
    let (n, k, most) = (200, 100, 40);
    let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
    for isa in Isa::available() {
        for form in Form::all_of(isa) {
            let x = values(3, 1 + most * (k + 1) + k);
            let (bytes, _) = weights(4, n * k, form.dtype);
            let w = pack(&[part(&bytes, form.dtype, n, k)], false, isa, Precision::F32).expect("valid parts");
            let all = run(isa, &pools[0], &Case { m: most, n, k, form }, &x, &w);
            for m in 1..=most {
                let some = run(isa, &pools[m % 3], &Case { m, n, k, form }, &x, &w);
                assert_eq!(bits(&some), bits(&all[..m * n]), "{isa} {form:?} m {m}");
            }
            for row in 0..most {
                let x = &x[row * (k + 1)..];
                let alone = run(isa, &pools[row % 3], &Case { m: 1, n, k, form }, x, &w);
                assert_eq!(bits(&alone), bits(&all[row * n..(row + 1) * n]), "{isa} {form:?} row {row}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_rows_and_columns() {
    let (m, n, k) = (9, 40, 21);
    let pool = Pool::new(2);
    for isa in Isa::available() {
        for form in Form::all_of(isa) {
            let dtype = form.dtype;
            let mut x = values(5, m * k);
            x[2 * k + 5] = f32::NAN;
            x[4 * k + 20] = f32::INFINITY;
            let (mut bytes, mut wide) = weights(6, n * k, dtype);
            let infinity: u32 = match dtype {
                WeightType::F32 => 0xff80_0000,
                WeightType::Bf16 => 0xff80,
                WeightType::F16 => 0xfc00,
                WeightType::Blocks(_) => unreachable!("dense types only"),
            };
            let not_a_number = infinity | infinity >> 1;
            for (index, value) in [(3 * k + 1, infinity), (7 * k, not_a_number), (39 * k + 20, infinity)] {
                let size = dtype.bytes();
                bytes[index * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
                wide[index] = widen(value, dtype);
            }
            let w = pack(&[part(&bytes, dtype, n, k)], false, isa, Precision::F32).expect("valid parts");
            let mut out = vec![0.0; m * n];
            let operands = LinearOperands {
                m,
                x: &x,
                x_stride: k,
                bias: None,
                residual: Residual::None,
                out: &mut out,
                out_stride: n,
                activation: Activation::None,
            };
            LinearKernel::select(isa, w.layout(), form.products)
                .expect("available")
                .run(&pool, &w, operands)
                .expect("valid");
            assert_eq!(bits(&out), bits(&expected(form, &x, k, m, &wide, n, k)), "{isa} {form:?}");
        }
    }
}

fn activation_f64(activation: Activation, v: f64) -> f64 {
    match activation {
        Activation::None => v,
        Activation::Relu => v.max(0.0),
        Activation::Gelu => 0.5 * v * (1.0 + erf_f64(v / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v)).tanh())
        }
        Activation::Silu => v / (1.0 + (-v).exp()),
        Activation::Tanh => v.tanh(),
        Activation::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        Activation::QuickGelu => v / (1.0 + (-1.702 * v).exp()),
        Activation::Relu6 => v.clamp(0.0, 6.0),
    }
}

/// The Maclaurin series, for the small arguments of the tests.
fn erf_f64(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

const ACTIVATIONS: [Activation; 9] = [
    Activation::None,
    Activation::Relu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
    Activation::Tanh,
    Activation::Sigmoid,
    Activation::QuickGelu,
    Activation::Relu6,
];

#[test]
fn bias_activation_gate_and_residual_follow_in_order() {
    let (m, half, k) = (5, 37, 33);
    let pool = Pool::new(2);
    for isa in Isa::available() {
        for gated in [false, true] {
            let n = if gated { 2 * half } else { half };
            let (bytes, wide) = weights(8, n * k, WeightType::F32);
            let (gate, up) = bytes.split_at(half * k * 4);
            let (gate, up) = (part(gate, WeightType::F32, half, k), part(up, WeightType::F32, n - half, k));
            let parts = [gate, up];
            let w =
                pack(&parts[..if gated { 2 } else { 1 }], gated, isa, Precision::F32).expect("valid parts");
            let x = values(7, m * k);
            let (bias, residual) = (values(9, n), values(10, m * half));
            let acc = expected(Form::F32, &x, k, m, &wide, n, k);
            for activation in ACTIVATIONS {
                for in_place in [false, true] {
                    let mut out = residual.clone();
                    let rows = Residual::Rows { values: &residual, stride: half };
                    let operands = LinearOperands {
                        m,
                        x: &x,
                        x_stride: k,
                        bias: Some(&bias),
                        residual: if in_place { Residual::Out } else { rows },
                        out: &mut out,
                        out_stride: half,
                        activation,
                    };
                    LinearKernel::select(isa, w.layout(), Products::F32)
                        .expect("available")
                        .run(&pool, &w, operands)
                        .expect("valid");
                    for (index, &found) in out.iter().enumerate() {
                        let (row, column) = (index / half, index % half);
                        let biased = |column: usize| f64::from(acc[row * n + column] + bias[column]);
                        let mut wanted = activation_f64(activation, biased(column));
                        if gated {
                            wanted *= biased(column + half);
                        }
                        wanted += f64::from(residual[index]);
                        let error = (f64::from(found) - wanted).abs();
                        assert!(error <= 1e-6, "{isa} {activation:?} gated {gated}: {found} {wanted}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_source_order_packs_to_the_same_bytes_and_gathers_back() {
    for isa in Isa::ALL {
        for dtype in TYPES {
            for k in [0, 1, 2, 15, 16, 33, 70] {
                let shapes = [50, 7, 16];
                let n: usize = shapes.iter().sum();
                let size = dtype.bytes();
                let (bytes, wide) = weights(11, n * k, dtype);
                let (mut parts, mut turned, mut start) = (Vec::new(), Vec::new(), 0);
                for n in shapes {
                    let rows = &bytes[start * k * size..(start + n) * k * size];
                    parts.push(part(rows, dtype, n, k));
                    let element = |i: usize, j: usize| rows[(j * k + i) * size..][..size].to_vec();
                    let columns: Vec<u8> =
                        (0..k).flat_map(|i| (0..n).flat_map(move |j| element(i, j))).collect();
                    turned.push((n, columns));
                    start += n;
                }
                let packed = pack(&parts, false, isa, Precision::F32).expect("valid parts");
                assert_eq!(packed.bytes().len(), size_of_packed(n, k, dtype, isa).expect("a small size"));
                let order = WeightOrder::Transposed;
                let turned: Vec<WeightPart<'_>> =
                    turned.iter().map(|(n, bytes)| WeightPart { bytes, dtype, n: *n, k, order }).collect();
                assert_eq!(
                    pack(&turned, false, isa, Precision::F32).expect("valid parts").bytes(),
                    packed.bytes()
                );
                let pooled = pack_on(&Pool::new(3), &parts, false, isa, Precision::F32).expect("valid parts");
                assert_eq!(pooled.bytes(), packed.bytes());
                let mut row = vec![0.0; k];
                for index in 0..n {
                    packed.gather_row(index, &mut row);
                    assert_eq!(bits(&row), bits(&wide[index * k..(index + 1) * k]), "{isa} {dtype:?} k {k}");
                }
                let (gate, up) =
                    (part(&bytes[..36 * k * size], dtype, 36, k), &bytes[36 * k * size..72 * k * size]);
                let gated =
                    pack(&[gate, part(up, dtype, 36, k)], true, isa, Precision::F32).expect("valid parts");
                for index in 0..72 {
                    gated.gather_row(index, &mut row);
                    assert_eq!(bits(&row), bits(&wide[index * k..(index + 1) * k]), "{isa} {dtype:?} k {k}");
                }
            }
        }
    }
}

#[test]
fn parts_of_mixed_types_are_widened() {
    let k = 5;
    let (f32_bytes, f32_wide) = weights(12, 3 * k, WeightType::F32);
    let (f16_bytes, f16_wide) = weights(13, 4 * k, WeightType::F16);
    let parts = [part(&f32_bytes, WeightType::F32, 3, k), part(&f16_bytes, WeightType::F16, 4, k)];
    let packed = pack(&parts, false, Isa::Scalar, Precision::F32).expect("valid parts");
    assert_eq!(packed.layout().dtype(), WeightType::F32);
    let wide = [f32_wide, f16_wide].concat();
    let mut row = vec![0.0; k];
    for index in 0..7 {
        packed.gather_row(index, &mut row);
        assert_eq!(bits(&row), bits(&wide[index * k..(index + 1) * k]));
    }
}

#[test]
fn bad_parts_and_operands_are_named() {
    let bytes = [0u8; 48];
    let good = part(&bytes, WeightType::F32, 4, 3);
    let error = |parts: &[WeightPart<'_>], gated| {
        pack(parts, gated, Isa::Scalar, Precision::F32).expect_err("bad parts")
    };
    assert_eq!(error(&[], false), PackError::NoParts);
    let short = part(&bytes[1..], WeightType::F32, 4, 3);
    assert_eq!(error(&[good, short], false), PackError::PartBytes { part: 1, expected: 48, found: 47 });
    let other = part(&bytes, WeightType::F32, 3, 4);
    assert_eq!(error(&[good, other], false), PackError::PartInputs { part: 1, expected: 3, found: 4 });
    assert_eq!(error(&[good], true), PackError::GatedParts { columns: vec![4] });
    let huge = part(&bytes, WeightType::F32, usize::MAX, 3);
    assert_eq!(error(&[huge], false), PackError::TooLarge);
    assert!(PackedLayout::new(WeightType::F32, usize::MAX / 2, 1 << 40, false, Isa::Scalar).is_err());

    let w = pack(&[good], false, Isa::Scalar, Precision::F32).expect("valid parts");
    assert!(PackedMatrix::from_storage(*w.layout(), std::sync::Arc::new(vec![0u8; 10]), 0).is_err());
    let kernel = LinearKernel::select(Isa::Scalar, w.layout(), Products::F32).expect("scalar");
    let mut out = [0.0; 7];
    let operands = LinearOperands {
        m: 2,
        x: &[0.0; 6],
        x_stride: 3,
        bias: None,
        residual: Residual::None,
        out: &mut out,
        out_stride: 4,
        activation: Activation::None,
    };
    let found = kernel.run(&Pool::new(1), &w, operands).expect_err("a short output");
    assert_eq!(found, LinearError::Operand { name: "out", expected: 8, found: 7 });
}

#[test]
fn grids_cover_every_output_once() {
    for isa in Isa::available() {
        for (n, k) in [(1152, 384), (384, 1536), (3072, 576), (100, 3), (49_152, 576), (32, 0)] {
            let layout = PackedLayout::new(WeightType::F32, n, k, false, isa).expect("a layout");
            let kernel = LinearKernel::select(isa, &layout, Products::F32).expect("available");
            for m in [0, 1, 3, 4, 14, 16, 33, 128, 517] {
                for workers in [1, 2, 5, 64] {
                    let grid = kernel.grid(m, workers);
                    let mut seen = vec![0u8; m * layout.panels()];
                    for tile in 0..grid.tiles() {
                        for (chunks, panels) in grid.parts(tile) {
                            for row in chunks.flat_map(|chunk| grid.rows_of(chunk)) {
                                panels.clone().for_each(|panel| seen[row * layout.panels() + panel] += 1);
                            }
                        }
                    }
                    assert!(seen.iter().all(|&times| times == 1), "{isa} m {m} n {n} workers {workers}");
                }
            }
        }
    }
}

#[test]
fn bf16_precision_packs_every_source_rounded() {
    for isa in Isa::ALL {
        for k in [0, 1, 2, 17, 70] {
            let (mut parts, mut wanted, mut turned) = (Vec::new(), Vec::new(), Vec::new());
            let sources: Vec<_> = TYPES
                .iter()
                .enumerate()
                .map(|(i, &dtype)| (dtype, weights(20 + i as u64, 21 * k, dtype)))
                .collect();
            for (dtype, (bytes, wide)) in &sources {
                parts.push(part(bytes, *dtype, 21, k));
                wanted.extend(wide.iter().map(|&v| bf16_to_f32(f32_to_bf16(v))));
                let element =
                    |i: usize, j: usize| bytes[(j * k + i) * dtype.bytes()..][..dtype.bytes()].to_vec();
                turned
                    .push((0..k).flat_map(|i| (0..21).flat_map(move |j| element(i, j))).collect::<Vec<u8>>());
            }
            let packed = pack(&parts, false, isa, Precision::Bf16).expect("valid parts");
            assert_eq!(packed.layout().dtype(), WeightType::Bf16);
            let mut row = vec![0.0; k];
            for index in 0..63 {
                packed.gather_row(index, &mut row);
                assert_eq!(bits(&row), bits(&wanted[index * k..(index + 1) * k]), "{isa} k {k}");
            }
            let order = WeightOrder::Transposed;
            let turned: Vec<WeightPart<'_>> = (turned.iter().zip(&parts))
                .map(|(bytes, part)| WeightPart { bytes, order, ..*part })
                .collect();
            let turned = pack(&turned, false, isa, Precision::Bf16).expect("valid parts");
            assert_eq!(turned.bytes(), packed.bytes(), "{isa} k {k}");
        }
    }
}

#[test]
fn bf16_products_are_chosen_by_features_alone() {
    let choose = |bf16, fast, isa| {
        let features = CpuFeatures { avx512_bf16: bf16, avx512_bf16_fast: fast, ..CpuFeatures::default() };
        Products::choose_for(&features, Precision::Bf16, isa)
    };
    assert_eq!(choose(true, true, Isa::Avx512), Products::Bf16Dot);
    assert_eq!(choose(true, false, Isa::Avx512), Products::Bf16Fma);
    assert_eq!(choose(false, false, Isa::Avx512), Products::Bf16Fma);
    assert_eq!(choose(true, true, Isa::Avx2), Products::Bf16Fma);
    for isa in Isa::ALL {
        assert_eq!(Products::choose(Precision::F32, isa), Products::F32);
        let chosen = Products::choose(Precision::Bf16, isa);
        assert_eq!(chosen.is_available(isa), isa.is_available(), "{isa} {chosen:?}");
    }
}

/// Products too small for a normal f32: `vdpbf16ps` takes and leaves them as zero, which costs at most 2^-126 a product and a sum.
#[test]
fn denormals_of_the_two_bf16_forms_differ_by_less_than_the_least_normal_a_step() {
    let (m, n, k) = (5, 40, 33);
    let pool = Pool::new(1);
    let isa = Isa::Avx512;
    if !Products::Bf16Dot.is_available(isa) {
        return;
    }
    let x: Vec<f32> = values(30, m * k).iter().map(|v| v * 2.0f32.powi(-70)).collect();
    let (mut bytes, _) = weights(31, n * k, WeightType::Bf16);
    for value in bytes.chunks_exact_mut(2) {
        let scaled = bf16_to_f32(u16::from_le_bytes([value[0], value[1]])) * 2.0f32.powi(-56);
        value.copy_from_slice(&f32_to_bf16(scaled).to_le_bytes());
    }
    let w = pack(&[part(&bytes, WeightType::Bf16, n, k)], false, isa, Precision::Bf16).expect("valid parts");
    let results = [Products::Bf16Fma, Products::Bf16Dot].map(|products| {
        let mut out = vec![0.0; m * n];
        let operands = LinearOperands {
            m,
            x: &x,
            x_stride: k,
            bias: None,
            residual: Residual::None,
            out: &mut out,
            out_stride: n,
            activation: Activation::None,
        };
        LinearKernel::select(isa, w.layout(), products)
            .expect("available")
            .run(&pool, &w, operands)
            .expect("valid");
        out
    });
    let [fma, dot] = results;
    assert!(fma.iter().any(|v| v.is_subnormal()) && dot.iter().all(|v| !v.is_subnormal()));
    let bound = 2.0 * k as f32 * f32::MIN_POSITIVE;
    assert!(fma.iter().zip(&dot).all(|(a, b)| (a - b).abs() <= bound));
}

/// Against f64, with `u` half a unit in the last place: a sum of k fused steps errs by `k u` of the sum of magnitudes at most, a
/// product of rounded operands by twice their unit.
#[test]
fn errors_stay_within_what_each_precision_allows() {
    let (m, n) = (7, 50);
    let (unit, bf16_unit) = (2.0f64.powi(-24), 2.0f64.powi(-8) / 2.0);
    let pool = Pool::new(2);
    for isa in Isa::available() {
        for k in [384, 1536] {
            let (bytes, wide) = weights(41, n * k, WeightType::F32);
            let x = values(40, m * k);
            for precision in Precision::ALL {
                let products = Products::choose(precision, isa);
                let w =
                    pack(&[part(&bytes, WeightType::F32, n, k)], false, isa, precision).expect("valid parts");
                let mut out = vec![0.0; m * n];
                let operands = LinearOperands {
                    m,
                    x: &x,
                    x_stride: k,
                    bias: None,
                    residual: Residual::None,
                    out: &mut out,
                    out_stride: n,
                    activation: Activation::None,
                };
                let kernel = LinearKernel::select(isa, w.layout(), products).expect("available");
                kernel.run(&pool, &w, operands).expect("valid");
                let operand_error = match precision {
                    Precision::F32 => 0.0,
                    Precision::Bf16 => 2.0 * bf16_unit + bf16_unit * bf16_unit,
                };
                let mut largest = 0.0f64;
                for (index, &found) in out.iter().enumerate() {
                    let (x, w) = (&x[index / n * k..][..k], &wide[index % n * k..][..k]);
                    let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                    let (exact, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    let relative = (f64::from(found) - exact).abs() / magnitude;
                    assert!(
                        relative <= operand_error + k as f64 * unit,
                        "{isa} {precision} k {k}: {relative}"
                    );
                    largest = largest.max(relative);
                }
                let rounded = precision == Precision::Bf16;
                assert_eq!(largest > 100.0 * unit, rounded, "{isa} {precision} k {k}: {largest}");
            }
        }
    }
}
