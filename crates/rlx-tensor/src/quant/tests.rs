use super::*;
use std::path::PathBuf;

fn golden(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../rlx-conformance/data/quant");
    std::fs::read(folder.join(name)).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A normal-ish stream of fixed values, no two groups of the same spread.
fn values(count: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|i| (uniform() + uniform() + uniform() + uniform()) * (1.0 + (i / 32 % 7) as f32))
        .collect()
}

#[test]
fn every_type_decodes_to_the_bits_of_the_gguf_package() {
    let mut checked = 0;
    for dtype in DType::ALL.iter().copied().filter(|dtype| dtype.class() == crate::DTypeClass::Quant) {
        let (elements, block_bytes) = dtype.block();
        let file = golden(&format!("{dtype}.decode.bin"));
        let blocks = file.len() / (block_bytes + 4 * elements);
        assert!(blocks >= 4, "{dtype}");
        let (bytes, expected) = file.split_at(blocks * block_bytes);
        let mut out = vec![0.0; blocks * elements];
        decode(dtype, bytes, &mut out).unwrap();
        for (i, (found, expected)) in out.iter().zip(floats(expected)).enumerate() {
            assert_eq!(found.to_bits(), expected.to_bits(), "{dtype} element {i}: {found} {expected}");
        }
        checked += 1;
    }
    assert_eq!(checked, 20);
}

#[test]
fn types_defined_by_rounding_encode_to_the_bytes_of_the_gguf_package() {
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0] {
        let (elements, block_bytes) = dtype.block();
        let file = golden(&format!("{dtype}.encode.bin"));
        let blocks = file.len() / (block_bytes + 4 * elements);
        let (values, expected) = file.split_at(blocks * elements * 4);
        let mut out = vec![0; blocks * block_bytes];
        encode(dtype, &floats(values), &mut out).unwrap();
        for (i, (found, expected)) in
            out.chunks_exact(block_bytes).zip(expected.chunks_exact(block_bytes)).enumerate()
        {
            assert_eq!(found, expected, "{dtype} block {i}");
        }
    }
}

fn round_trip(dtype: DType, values: &[f32]) -> Vec<f32> {
    let mut bytes = vec![0; dtype.bytes_for(values.len()).unwrap()];
    encode(dtype, values, &mut bytes).unwrap();
    let mut out = vec![0.0; values.len()];
    decode(dtype, &bytes, &mut out).unwrap();
    out
}

fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn more_bits_give_a_smaller_error_and_searched_scales_beat_plain_ones() {
    let values = values(64 * SUPERBLOCK);
    let error = |dtype| squared_error(&values, &round_trip(dtype, &values));
    let order = [DType::Q4_0, DType::Q4_K, DType::Q5_0, DType::Q5_K, DType::Q6_K, DType::Q8_0];
    let errors = order.map(error);
    for (pair, names) in errors.windows(2).zip(order.windows(2)) {
        assert!(pair[1] < pair[0], "{} {} against {} {}", names[1], pair[1], names[0], pair[0]);
    }
    // Both hold 4 bits, a scale and a minimum for 32 elements.
    assert!(error(DType::Q4_K) < 1.05 * error(DType::Q4_1));
}

#[test]
fn an_error_is_at_most_half_a_step_and_the_rounding_of_scales() {
    let values = values(64 * SUPERBLOCK);
    for (dtype, group, steps) in
        [(DType::Q4_K, 32, 15.0f32), (DType::Q5_K, 32, 31.0), (DType::Q6_K, 16, 63.0)]
    {
        let decoded = round_trip(dtype, &values);
        for (i, (x, y)) in values.chunks(group).zip(decoded.chunks(group)).enumerate() {
            let largest = |x: &[f32]| x.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let around = &values[i * group / SUPERBLOCK * SUPERBLOCK..][..SUPERBLOCK];
            // Scales and minima of six bits are off by half of 1/63 of the largest of their superblock.
            let bound = 2.0 * largest(x) / steps + 2.0 * largest(around) / 63.0;
            for (x, y) in x.iter().zip(y) {
                assert!((x - y).abs() <= bound, "{dtype} {x} {y} {bound}");
            }
        }
    }
}

#[test]
fn constant_and_zero_blocks_survive() {
    for dtype in [
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q8_0,
        DType::Q4_K,
        DType::Q5_K,
        DType::Q6_K,
    ] {
        assert!(round_trip(dtype, &[0.0; SUPERBLOCK]).iter().all(|v| *v == 0.0), "{dtype}");
        for constant in [2.0f32, -2.0] {
            for v in round_trip(dtype, &[constant; SUPERBLOCK]) {
                assert!((v - constant).abs() < 0.02, "{dtype} {v}");
            }
        }
    }
}

#[test]
fn lengths_and_types_are_checked() {
    let mut out = [0.0; 32];
    assert!(decode(DType::Q4_0, &[0; 18], &mut out).is_ok());
    assert!(matches!(decode(DType::Q4_0, &[0; 17], &mut out), Err(QuantError::Length { .. })));
    assert!(matches!(decode(DType::Q4_0, &[0; 18], &mut out[..31]), Err(QuantError::Length { .. })));
    assert!(matches!(decode(DType::I8, &[0; 32], &mut out), Err(QuantError::DType { .. })));
    assert!(matches!(encode(DType::IQ2_S, &out, &mut [0; 18]), Err(QuantError::DType { .. })));
    assert!(matches!(encode(DType::Q8_0, &out, &mut [0; 18]), Err(QuantError::Length { .. })));
}
