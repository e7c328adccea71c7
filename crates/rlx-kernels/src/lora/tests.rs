use super::*;
use crate::isa::half::f32_to_bf16;

struct Adapter {
    values: Vec<f32>,
    stored: Vec<u8>,
    rank: usize,
}

const WIDTH: usize = 800;

fn number(seed: usize) -> f32 {
    ((seed * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0
}

fn adapter(rank: usize, factors: FactorType) -> Adapter {
    let raw: Vec<f32> = (0..rank * WIDTH).map(|i| number(i + 17 * rank)).collect();
    match factors {
        FactorType::F32 => {
            Adapter { stored: raw.iter().flat_map(|v| v.to_ne_bytes()).collect(), values: raw, rank }
        }
        FactorType::Bf16 => {
            let halves: Vec<u16> = raw.iter().map(|&v| f32_to_bf16(v)).collect();
            let values = halves.iter().map(|&h| f32::from_bits(u32::from(h) << 16)).collect();
            Adapter { stored: halves.iter().flat_map(|v| v.to_ne_bytes()).collect(), values, rank }
        }
    }
}

/// Updates of rows of `k` values with these adapters' factors from column 3 on.
fn deltas(
    isa: Isa,
    kind: FactorType,
    x: &[f32],
    (k, n): (usize, usize),
    slots: &[i32],
    adapters: &[Adapter],
) -> Vec<f32> {
    let m = slots.len();
    let factors: Vec<Factors> =
        adapters.iter().map(|a| Factors { rows: a.stored.as_ptr(), rank: a.rank, stride: WIDTH }).collect();
    let scales: Vec<f32> = (0..adapters.len()).map(|i| i as f32 / 2.0).collect();
    let (mut t, mut delta) = (vec![0.0f32; m * 16], vec![f32::NAN; m * n]);
    let args = LoraArgs {
        x: x.as_ptr(),
        x_stride: k,
        m,
        slots: slots.as_ptr(),
        factors: factors.as_ptr(),
        scales: scales.as_ptr(),
        scales_stride: 1,
        a: 3,
        k,
        b: 3 + k,
        n,
        t: t.as_mut_ptr(),
        t_stride: 16,
        delta: delta.as_mut_ptr(),
        delta_stride: n,
    };
    let (down, up) = (down_entry(isa, kind).unwrap(), up_entry(isa, kind).unwrap());
    // SAFETY: the vectors hold the rows, and every slot names one of the adapters or is negative.
    unsafe {
        (0..args.row_tiles()).for_each(|tile| down(&args, tile));
        (0..args.up_tiles()).for_each(|tile| up(&args, tile));
    }
    delta
}

#[test]
fn updates_follow_their_definition_and_do_not_depend_on_neighbours_or_the_instruction_set() {
    for kind in [FactorType::F32, FactorType::Bf16] {
        let adapters = [adapter(8, kind), adapter(5, kind), adapter(1, kind)];
        for (k, n) in [(1, 1), (33, 70), (64, 600), (100, 17)] {
            let slots = [1, 1, 1, 1, -1, 2, 1, 0, -1, 1, 2];
            let x: Vec<f32> = (0..slots.len() * k).map(|i| number(i * 31)).collect();
            let scalar = deltas(Isa::Scalar, kind, &x, (k, n), &slots, &adapters);
            for (row, &slot) in slots.iter().enumerate() {
                let found = &scalar[row * n..(row + 1) * n];
                if slot < 1 {
                    assert!(
                        found.iter().all(|v| v.to_bits() == (-0.0f32).to_bits()),
                        "slot {slot}: {found:?}"
                    );
                    continue;
                }
                let adapter = &adapters[slot as usize];
                for (j, &found) in found.iter().enumerate() {
                    let term = |factors: &[f32]| -> f64 {
                        let x = x[row * k..].iter().take(k);
                        let t: f64 = x.zip(&factors[3..]).map(|(&x, &a)| f64::from(x) * f64::from(a)).sum();
                        t * f64::from(factors[3 + k + j])
                    };
                    let sum: f64 = adapter.values.chunks(WIDTH).map(term).sum();
                    let (expected, roundings) = (sum * f64::from(slot) / 2.0, (k + adapter.rank + 4) as f64);
                    let bound = roundings * f64::from(f32::EPSILON) * (k * adapter.rank) as f64;
                    assert!((f64::from(found) - expected).abs() <= bound, "{found} for {expected}");
                }
                let alone = deltas(Isa::Scalar, kind, &x[row * k..], (k, n), &[slot], &adapters);
                assert_eq!(alone, found, "row {row} alone and among others");
            }
            for isa in Isa::available() {
                let same = deltas(isa, kind, &x, (k, n), &slots, &adapters);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&same), bits(&scalar), "{isa} {kind:?} {k} {n}");
            }
        }
    }
}
