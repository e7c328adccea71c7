use super::*;

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 200.0 - 2.0).collect()
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    groups: usize,
    cols: usize,
    residual: bool,
    bias: bool,
}

/// Output rows and sums.
fn run(rows: &[Row<NormArgs>], isa: Isa, shape: Shape, rows_per_tile: usize) -> (Vec<f32>, Vec<f32>) {
    let Shape { cols, groups, .. } = shape;
    let width = groups * cols;
    let stride = width + 3;
    let x = noise(shape.rows * stride);
    let residual: Vec<f32> = noise(shape.rows * stride + 5).split_off(5);
    let (weight, bias) = (noise(cols + 1).split_off(1), noise(cols + 2).split_off(2));
    let mut y = vec![0.0; shape.rows * stride];
    let mut sum = vec![0.0; shape.rows * stride];
    let args = NormArgs {
        x: x.as_ptr(),
        x_stride: stride,
        residual: if shape.residual { residual.as_ptr() } else { std::ptr::null() },
        residual_stride: stride,
        sum: if shape.residual { sum.as_mut_ptr() } else { std::ptr::null_mut() },
        sum_stride: stride,
        y: y.as_mut_ptr(),
        y_stride: stride,
        weight: weight.as_ptr(),
        weight_offset: 1.0,
        bias: if shape.bias { bias.as_ptr() } else { std::ptr::null() },
        rows: shape.rows,
        groups,
        group_stride: cols,
        cols,
        eps: 1e-5,
        rows_per_tile,
    };
    let entry = select(rows, isa).expect("a scalar row exists");
    for tile in 0..args.tiles() {
        // SAFETY: the vectors above hold what the arguments say.
        unsafe { entry(&args, tile) };
    }
    (y, sum)
}

fn reference(op: &str, shape: Shape) -> Vec<f32> {
    let width = shape.groups * shape.cols;
    let stride = width + 3;
    let x = noise(shape.rows * stride);
    let residual: Vec<f32> = noise(shape.rows * stride + 5).split_off(5);
    let (weight, bias) = (noise(shape.cols + 1).split_off(1), noise(shape.cols + 2).split_off(2));
    let mut out = vec![0.0; shape.rows * stride];
    for run in 0..shape.rows * shape.groups {
        let at = run / shape.groups * stride + run % shape.groups * shape.cols;
        let row: Vec<f64> = (at..at + shape.cols)
            .map(|i| f64::from(if shape.residual { x[i] + residual[i] } else { x[i] }))
            .collect();
        let n = shape.cols as f64;
        let mean = if op == "layer_norm" { row.iter().sum::<f64>() / n } else { 0.0 };
        let squares: f64 = row.iter().map(|v| (v - mean) * (v - mean)).sum();
        let scale = if op == "l2_norm" { 1.0 / squares.sqrt() } else { 1.0 / (squares / n + 1e-5).sqrt() };
        for (i, v) in row.iter().enumerate() {
            let b = if shape.bias { f64::from(bias[i]) } else { 0.0 };
            out[at + i] = ((v - mean) * scale * (f64::from(weight[i]) + 1.0) + b) as f32;
        }
    }
    out
}

#[test]
fn norms_agree_with_their_definition_and_between_instruction_sets_and_tilings() {
    for cols in [1, 2, 15, 16, 17, 63, 64, 65, 130, 384] {
        for (residual, bias, groups) in
            [(false, false, 1), (true, true, 1), (true, false, 3), (false, true, 2)]
        {
            let shape = Shape { rows: 5, groups, cols, residual, bias };
            for rows in [&LAYER_NORM, &RMS_NORM, &L2_NORM] {
                let want = reference(rows[0].op, shape);
                let (scalar, sums) = run(rows, Isa::Scalar, shape, 5);
                for (a, b) in scalar.iter().zip(&want) {
                    assert!(
                        (a - b).abs() <= 2e-5 * b.abs().max(1.0),
                        "{} {shape:?}: {a} against {b}",
                        rows[0].op
                    );
                }
                for isa in Isa::available() {
                    let (y, sum) = run(rows, isa, shape, 2);
                    assert!(
                        y.iter().zip(&scalar).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{isa} {shape:?}"
                    );
                    assert_eq!(sum, sums);
                }
            }
        }
    }
}

#[test]
fn the_second_output_is_the_sum() {
    let shape = Shape { rows: 2, groups: 1, cols: 19, residual: true, bias: false };
    let (_, sum) = run(&RMS_NORM, Isa::detect(), shape, 1);
    let (x, residual) = (noise(2 * 22), noise(2 * 22 + 5).split_off(5));
    for i in 0..19 {
        assert_eq!(sum[i], x[i] + residual[i]);
    }
}

#[test]
fn a_row_of_zeros_stays_finite() {
    let x = [0.0f32; 20];
    let mut y = [1.0f32; 20];
    for rows in [&LAYER_NORM, &RMS_NORM, &L2_NORM] {
        let args = NormArgs {
            x: x.as_ptr(),
            x_stride: 20,
            residual: std::ptr::null(),
            residual_stride: 0,
            sum: std::ptr::null_mut(),
            sum_stride: 0,
            y: y.as_mut_ptr(),
            y_stride: 20,
            weight: std::ptr::null(),
            weight_offset: 0.0,
            bias: std::ptr::null(),
            rows: 1,
            groups: 1,
            group_stride: 0,
            cols: 20,
            eps: 1e-12,
            rows_per_tile: 1,
        };
        // SAFETY: both arrays hold one row.
        unsafe { select(rows, Isa::detect()).expect("a scalar row exists")(&args, 0) };
        assert_eq!(y, [0.0; 20]);
    }
}
