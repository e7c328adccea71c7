use rlx_tensor::quant::decode;

use super::*;

/// Pseudo-random bytes from a counter.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let byte = |index: usize| {
        let mut h = (seed << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 29;
        h = h.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (h >> 40) as u8
    };
    (0..len).map(byte).collect()
}

/// Rows of random blocks whose scales are moderate numbers.
fn blocks(seed: u64, dtype: DType, n: usize, k: usize) -> Vec<u8> {
    let geometry = &format_of(dtype).expect("a format").geometry;
    let mut bytes = noise(seed, source_bytes(dtype, n, k).expect("whole blocks"));
    for (index, block) in bytes.chunks_exact_mut(geometry.block.1).enumerate() {
        // IQ4_XS keeps bits of scales in its second short.
        let shorts = if dtype == DType::IQ4_XS { &geometry.shorts[..1] } else { geometry.shorts };
        for &at in shorts {
            // An exponent of 2^-8 .. 2^-5, either sign.
            let exponent = 0x1c + ((index as u8).wrapping_mul(5) & 0x0f);
            block[at + 1] = exponent | (block[at + 1] & 0x80);
        }
    }
    bytes
}

fn values(seed: u64, len: usize) -> Vec<f32> {
    let bytes = noise(seed, 4 * len);
    let value = |b: &[u8]| {
        let unit = f32::from(u16::from_le_bytes([b[0], b[1]])) / 32_768.0 - 1.0;
        unit / f32::from(1u16 << (b[2] & 7))
    };
    bytes.chunks_exact(4).map(value).collect()
}

/// A row as the definition quantises it: codes, and per 32 of them a scale.
fn quantized(x: &[f32]) -> (Vec<i32>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for cell in x.chunks_exact(CELL) {
        let largest = cell.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = if largest == 0.0 { 0.0 } else { 127.0 / largest };
        scales.push(largest / 127.0);
        codes.extend(cell.iter().map(|v| (v * inverse).round_ties_even() as i32));
    }
    (codes, scales)
}

fn packed(set: DotSet, dtype: DType, bytes: &[u8], n: usize, k: usize) -> Vec<u8> {
    let columns = crate::gemm::panel_columns(set.isa());
    let row_bytes = bytes.len() / n.max(1);
    let mut out = vec![0u8; n.div_ceil(columns) * panel_bytes(dtype, k, columns)];
    let size = panel_bytes(dtype, k, columns);
    for (panel, out) in out.chunks_exact_mut(size).enumerate() {
        let source = |lane: usize| {
            let column = panel * columns + lane;
            (column < n).then(|| &bytes[column * row_bytes..(column + 1) * row_bytes])
        };
        let sources: Vec<_> = (0..columns).map(source).collect();
        pack_panel(dtype, k, &sources, out);
    }
    out
}

/// `m x n` sums by the kernels, in chunks as grids cut them.
fn product(set: DotSet, dtype: DType, x: &[f32], m: usize, w: &[u8], n: usize, k: usize) -> Vec<f32> {
    let columns = crate::gemm::panel_columns(set.isa());
    let chosen = choose_set(set, dtype, columns).expect("an available set");
    let mut out = vec![0.0; m * n];
    let mut quantized = vec![0.0f32; CHUNK_ROWS * row_bytes(k) / size_of::<f32>()];
    for start in (0..m).step_by(CHUNK_ROWS) {
        let rows = CHUNK_ROWS.min(m - start);
        let panels = Panels { w: w.as_ptr(), k, which: 0..n.div_ceil(columns) };
        let x = &x[start * k..(start + rows) * k];
        // SAFETY: rows, panels and scratch are as long as the sizes say; the set is available.
        unsafe {
            chosen.quantize((rows, k), 0..rows, (x.as_ptr(), k), quantized.as_mut_ptr().cast());
            chosen.run_chunk(
                rows,
                quantized.as_ptr().cast(),
                &panels,
                |_| [None; 2],
                |panel, acc, stride| {
                    for row in 0..rows {
                        for lane in 0..columns.min(n - panel * columns) {
                            out[(start + row) * n + panel * columns + lane] = *acc.add(row * stride + lane);
                        }
                    }
                },
            );
        }
    }
    out
}

fn sets() -> Vec<DotSet> {
    DotSet::ALL.into_iter().filter(|set| set.is_available()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn strips_hold_the_blocks_bytes_and_decode_to_the_plain_decoders_bits() {
    for dtype in dtypes() {
        let geometry = &format_of(dtype).expect("a format").geometry;
        assert_eq!(geometry.w_bytes + geometry.h_bytes, LANES * geometry.block.1, "{dtype}");
        let (n, k) = (37, 3 * geometry.block.0.max(64));
        let bytes = blocks(1, dtype, n, k);
        let mut plain = vec![0.0; n * k];
        decode(dtype, &bytes, &mut plain).expect("whole blocks");
        let set = DotSet::of(Isa::detect()).expect("a set");
        let columns = crate::gemm::panel_columns(set.isa());
        let w = packed(set, dtype, &bytes, n, k);
        let size = panel_bytes(dtype, k, columns);
        let mut row = vec![0.0; k];
        for index in 0..n {
            let panel = &w[index / columns * size..(index / columns + 1) * size];
            column(dtype, panel, (index % columns, columns), &mut row);
            assert_eq!(bits(&row), bits(&plain[index * k..(index + 1) * k]), "{dtype} row {index}");
        }
    }
}

/// Against the definition in f64, of the same codes: what is left is one rounding per cell, its half or minimum.
#[test]
fn every_instance_is_within_the_roundings_of_the_definition() {
    for dtype in dtypes() {
        let geometry = &format_of(dtype).expect("a format").geometry;
        for (m, n, k) in [(1, 33, geometry.block.0), (2, 64, 512), (7, 40, 768), (70, 48, 256)] {
            let bytes = blocks(2, dtype, n, k);
            let mut wide = vec![0.0; n * k];
            decode(dtype, &bytes, &mut wide).expect("whole blocks");
            let x = values(3, m * k);
            let (mut wanted, mut bound) = (vec![0.0f64; m * n], vec![0.0f64; m * n]);
            for row in 0..m {
                let (codes, scales) = quantized(&x[row * k..(row + 1) * k]);
                for column in 0..n {
                    let weights = &wide[column * k..(column + 1) * k];
                    for (cell, weights) in weights.chunks_exact(CELL).enumerate() {
                        // Random codes span their range, so scale times code and minimum are each at most twice this.
                        let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
                        for (i, weight) in weights.iter().enumerate() {
                            let x = f64::from(codes[cell * CELL + i]) * f64::from(scales[cell]);
                            wanted[row * n + column] += x * f64::from(*weight);
                            bound[row * n + column] += x.abs() * 2.0 * f64::from(largest);
                        }
                    }
                }
            }
            // The decoder rounds each value; the kernel each product, each partial sum and each minimum's factor.
            let roundings = 3.0 * (k / CELL) as f64 * 3.0 + 2.0;
            for set in sets() {
                let w = packed(set, dtype, &bytes, n, k);
                let found = product(set, dtype, &x, m, &w, n, k);
                for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                    let allowed = bound[index] * roundings * f64::from(f32::EPSILON) + 1e-12;
                    let error = (f64::from(*found) - wanted).abs();
                    assert!(error <= allowed, "{dtype} {} {m}x{n}x{k}: {found} {wanted}", set.name());
                }
            }
        }
    }
}

#[test]
fn every_set_and_row_count_gives_the_same_bits() {
    let (n, most) = (70, 140);
    for dtype in dtypes() {
        for k in [256, 768] {
            let bytes = blocks(4, dtype, n, k);
            let x = values(5, most * k);
            let scalar = packed(DotSet::Scalar, dtype, &bytes, n, k);
            let all = product(DotSet::Scalar, dtype, &x, most, &scalar, n, k);
            for set in sets() {
                let w = packed(set, dtype, &bytes, n, k);
                for m in [1, 2, 3, 4, 5, 6, 7, 12, 13, 67, 128, 140] {
                    let some = product(set, dtype, &x, m, &w, n, k);
                    assert_eq!(bits(&some), bits(&all[..m * n]), "{dtype} {} m {m} k {k}", set.name());
                }
                let row = 41;
                let alone = product(set, dtype, &x[row * k..], 1, &w, n, k);
                assert_eq!(bits(&alone), bits(&all[row * n..(row + 1) * n]), "{dtype} {}", set.name());
            }
        }
    }
}

#[test]
fn extremes_of_codes_are_exact() {
    for dtype in dtypes() {
        let geometry = &format_of(dtype).expect("a format").geometry;
        let (n, k) = (16, 512);
        for fill in [0x00, 0xff, 0x80, 0x7f] {
            let mut bytes = vec![fill; source_bytes(dtype, n, k).expect("whole blocks")];
            for block in bytes.chunks_exact_mut(geometry.block.1) {
                for &at in &geometry.shorts[..if dtype == DType::IQ4_XS { 1 } else { geometry.shorts.len() }]
                {
                    block[at..at + 2].copy_from_slice(&[0, 0x3c]);
                }
            }
            let mut wide = vec![0.0; n * k];
            decode(dtype, &bytes, &mut wide).expect("whole blocks");
            // Rows of the largest codes of either sign, scale 1.
            let x: Vec<f32> = (0..2 * k).map(|i| if i < k { 127.0 } else { -127.0 }).collect();
            for set in sets() {
                let w = packed(set, dtype, &bytes, n, k);
                for m in [1, 2] {
                    let found = product(set, dtype, &x[(2 - m) * k..], m, &w, n, k);
                    for (index, &found) in found.iter().enumerate() {
                        let (row, column) = (index / n + 2 - m, index % n);
                        let terms =
                            (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(wide[column * k + i]));
                        let wanted: f64 = terms.clone().sum();
                        let minima = if geometry.min { k as f64 * 127.0 * 63.0 } else { 0.0 };
                        // Partial results are integers, exact unless scales are large.
                        let allowed = (terms.map(f64::abs).sum::<f64>() + minima) * 2e-6;
                        let error = (f64::from(found) - wanted).abs();
                        assert!(error <= allowed, "{dtype} {} {fill:#x}: {found} {wanted}", set.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_cell_that_is_not_finite_makes_its_row_nan_and_no_other() {
    let (m, n, k, dtype) = (5, 20, 96, DType::Q8_0);
    let bytes = blocks(6, dtype, n, k);
    let mut x = values(7, m * k);
    (x[k + 40], x[3 * k]) = (f32::NAN, f32::NEG_INFINITY);
    x[4 * k..4 * k + 32].fill(1e-38);
    for set in sets() {
        let w = packed(set, dtype, &bytes, n, k);
        let found = product(set, dtype, &x, m, &w, n, k);
        for (row, values) in found.chunks_exact(n).enumerate() {
            assert!(values.iter().all(|v| v.is_nan() == (row == 1 || row == 3)), "{} row {row}", set.name());
        }
    }
}
