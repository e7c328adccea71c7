use super::*;

fn run(rows: &[Row<SoftmaxArgs>], isa: Isa, x: &[f32], cols: usize, scale: f32) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    let args = SoftmaxArgs {
        x: x.as_ptr(),
        x_stride: cols + 2,
        y: y.as_mut_ptr(),
        y_stride: cols + 2,
        rows: x.len() / (cols + 2),
        cols,
        scale,
        rows_per_tile: 2,
    };
    for tile in 0..args.tiles() {
        // SAFETY: both vectors hold the rows.
        unsafe { select(rows, isa).expect("a scalar row exists")(&args, tile) };
    }
    y
}

#[test]
fn rows_agree_with_the_definition_and_between_instruction_sets() {
    for cols in [1, 2, 15, 16, 17, 64, 65, 200] {
        let x: Vec<f32> = (0..3 * (cols + 2)).map(|i| ((i * 7919) % 101) as f32 / 7.0 - 7.0).collect();
        for (rows, log) in [(&SOFTMAX, false), (&LOG_SOFTMAX, true)] {
            let scalar = run(rows, Isa::Scalar, &x, cols, 0.7);
            for r in 0..3 {
                let at = r * (cols + 2);
                let v: Vec<f64> =
                    x[at..at + cols].iter().map(|v| f64::from(*v) * f64::from(0.7f32)).collect();
                let top = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = v.iter().map(|v| (v - top).exp()).sum();
                for (i, v) in v.iter().enumerate() {
                    let want = if log { v - top - sum.ln() } else { (v - top).exp() / sum };
                    let got = f64::from(scalar[at + i]);
                    assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "{cols}: {got} against {want}");
                }
            }
            for isa in Isa::available() {
                let got = run(rows, isa, &x, cols, 0.7);
                assert!(got.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa} {cols}");
            }
        }
    }
}

#[test]
fn minus_infinity_is_a_zero_and_nan_spreads() {
    let mut x = vec![0.0f32; 22];
    x[3] = f32::NEG_INFINITY;
    for isa in Isa::available() {
        let y = run(&SOFTMAX, isa, &x, 20, 1.0);
        assert_eq!(y[3], 0.0);
        assert!((y[4] - 1.0 / 19.0).abs() < 1e-7);
        let mut bad = x.clone();
        bad[5] = f32::NAN;
        assert!(run(&SOFTMAX, isa, &bad, 20, 1.0)[..20].iter().all(|v| v.is_nan()));
    }
}
