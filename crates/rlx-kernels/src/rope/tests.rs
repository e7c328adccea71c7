use super::*;

const POSITIONS: [i32; 3] = [0, 7, 4093];

fn table(isa: Isa, inv_freq: &[f32], factor: f32) -> Vec<f32> {
    let half = inv_freq.len();
    let mut table = vec![f32::NAN; POSITIONS.len() * 2 * half];
    let args = AngleArgs {
        positions: POSITIONS.as_ptr(),
        inv_freq: inv_freq.as_ptr(),
        half,
        factor,
        table: table.as_mut_ptr(),
    };
    for row in 0..POSITIONS.len() {
        // SAFETY: the vectors hold the rows.
        unsafe { angles_entry(isa).expect("a scalar row exists")(&args, row) };
    }
    table
}

fn rope(
    isa: Isa,
    x: &[f32],
    table: &[f32],
    dims: (usize, usize, usize),
    pairing: Pairing,
    in_place: bool,
) -> Vec<f32> {
    let (heads, head_dim, rotary_dim) = dims;
    let stride = heads * head_dim + 1;
    let mut y = if in_place { x.to_vec() } else { vec![0.0; x.len()] };
    let args = RopeArgs {
        x: if in_place { y.as_ptr() } else { x.as_ptr() },
        x_stride: stride,
        y: y.as_mut_ptr(),
        y_stride: stride,
        table: table.as_ptr(),
        rows: POSITIONS.len(),
        heads,
        head_dim,
        rotary_dim,
        pairing,
        rows_per_tile: 2,
    };
    for tile in 0..args.tiles() {
        // SAFETY: the vectors hold the rows.
        unsafe { rope_entry(isa).expect("a scalar row exists")(&args, tile) };
    }
    y
}

#[test]
fn heads_turn_by_their_angles() {
    for (heads, head_dim, rotary_dim) in [(1, 2, 2), (3, 10, 6), (2, 64, 64), (2, 80, 34)] {
        let half = rotary_dim / 2;
        let inv_freq: Vec<f32> = (0..half).map(|i| 10000f32.powf(-(i as f32) / half as f32)).collect();
        let angles = table(Isa::Scalar, &inv_freq, 1.5);
        let stride = heads * head_dim + 1;
        let x: Vec<f32> = (0..POSITIONS.len() * stride).map(|i| ((i * 31) % 17) as f32 - 8.0).collect();
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            let scalar = rope(Isa::Scalar, &x, &angles, (heads, head_dim, rotary_dim), pairing, false);
            for (row, position) in POSITIONS.iter().enumerate() {
                for head in 0..heads {
                    let at = row * stride + head * head_dim;
                    for i in 0..half {
                        let (a, b) = if pairing == Pairing::Halves {
                            (at + i, at + half + i)
                        } else {
                            (at + 2 * i, at + 2 * i + 1)
                        };
                        let angle = f64::from(*position as f32 * inv_freq[i]);
                        let (p, q) = (f64::from(x[a]), f64::from(x[b]));
                        let want = [p * angle.cos() - q * angle.sin(), q * angle.cos() + p * angle.sin()];
                        assert!((f64::from(scalar[a]) - 1.5 * want[0]).abs() < 3e-6);
                        assert!((f64::from(scalar[b]) - 1.5 * want[1]).abs() < 3e-6);
                    }
                    assert_eq!(scalar[at + rotary_dim..at + head_dim], x[at + rotary_dim..at + head_dim]);
                }
            }
            for isa in Isa::available() {
                assert_eq!(table(isa, &inv_freq, 1.5), angles);
                let got = rope(isa, &x, &angles, (heads, head_dim, rotary_dim), pairing, true);
                for row in 0..POSITIONS.len() {
                    let at = row * stride;
                    assert_eq!(got[at..at + stride - 1], scalar[at..at + stride - 1], "{isa} {pairing:?}");
                }
            }
        }
    }
}
