use super::*;
use crate::conv::{ConvLayer, Images};

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

#[test]
fn the_largest_bytes_are_those_of_their_numbers() {
    let (lines, columns, channels) = (5usize, 6usize, 19usize);
    let layer = ConvLayer {
        window: [3, 2],
        strides: [2, 1],
        dilations: [1, 1],
        before: [1, 0],
        after: [1, 1],
        groups: 1,
        channels,
        outputs: channels,
    };
    let images = Images { batch: 1, extents: [lines, columns], positions: [3, 6] };
    let bytes: Vec<u8> = (0..lines * columns * channels).map(|i| (i * 73 % 256) as u8).collect();
    let count = 3 * 6 * channels;
    for (values, number) in
        [(WindowValues::U8, (|b| f32::from(b)) as fn(u8) -> f32), (WindowValues::I8, |b| f32::from(b as i8))]
    {
        let floats: Vec<f32> = bytes.iter().map(|&b| number(b)).collect();
        for isa in Isa::available() {
            let (mut got, mut want) = (vec![0u8; count], vec![0f32; count]);
            let run = |values, x: *const u8, out: *mut u8| {
                let args = WindowArgs {
                    pooling: WindowPooling::Max,
                    layer,
                    images,
                    channels,
                    values,
                    x,
                    x_stride: channels,
                    out,
                    out_stride: channels,
                    lines: 3,
                };
                // SAFETY: the vectors are the images; there is one tile.
                unsafe { window_entry(isa).expect("a scalar row exists")(&args, 0) };
            };
            run(values, bytes.as_ptr(), got.as_mut_ptr());
            run(WindowValues::F32, floats.as_ptr().cast(), want.as_mut_ptr().cast());
            assert_eq!(got.iter().map(|&b| number(b)).collect::<Vec<_>>(), want, "{values:?} {isa}");
        }
    }
}
