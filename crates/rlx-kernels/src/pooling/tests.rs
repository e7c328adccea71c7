use super::*;

#[test]
fn each_sequence_is_pooled_alone() {
    let (cols, starts) = (19, [0i32, 3, 3, 4, 9]);
    let x: Vec<f32> = (0..9 * (cols + 2)).map(|i| ((i * 53) % 29) as f32 - 14.0).collect();
    for isa in Isa::available() {
        for pooling in [Pooling::Mean, Pooling::MeanSqrt, Pooling::First, Pooling::Last, Pooling::Max] {
            let mut out = vec![f32::NAN; 4 * cols];
            let args = PoolArgs {
                pooling,
                x: x.as_ptr(),
                x_stride: cols + 2,
                seq_starts: starts.as_ptr(),
                batch: 4,
                cols,
                out: out.as_mut_ptr(),
                out_stride: cols,
            };
            for b in 0..4 {
                // SAFETY: the vectors hold the rows.
                unsafe { pool_entry(isa).expect("a scalar row exists")(&args, b) };
            }
            for b in 0..4 {
                let rows = starts[b] as usize..starts[b + 1] as usize;
                for c in 0..cols {
                    let column: Vec<f32> = rows.clone().map(|r| x[r * (cols + 2) + c]).collect();
                    let n = column.len() as f32;
                    let want = match pooling {
                        _ if column.is_empty() => 0.0,
                        Pooling::Mean => column.iter().sum::<f32>() / n,
                        Pooling::MeanSqrt => column.iter().sum::<f32>() / n.sqrt(),
                        Pooling::First => column[0],
                        Pooling::Last => column[column.len() - 1],
                        Pooling::Max => column.iter().copied().fold(f32::NEG_INFINITY, f32::max),
                    };
                    assert_eq!(out[b * cols + c], want, "{isa} {pooling:?} {b} {c}");
                }
            }
        }
    }
}
