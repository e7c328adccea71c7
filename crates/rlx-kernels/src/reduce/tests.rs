use super::*;

fn reduce(isa: Isa, op: ReduceOp, x: &[f32], shape: (usize, usize, usize)) -> Vec<f32> {
    let (outer, axis, inner) = shape;
    let mut out = vec![0.0; outer * inner];
    let args = ReduceArgs {
        op,
        x: x.as_ptr(),
        outer_stride: axis * inner,
        axis_stride: inner,
        outer,
        axis,
        inner,
        out: out.as_mut_ptr(),
        outer_per_tile: 2,
    };
    for tile in 0..args.tiles() {
        // SAFETY: the vectors hold the shape.
        unsafe { reduce_entry(isa).expect("a scalar row exists")(&args, tile) };
    }
    out
}

const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::Prod];

#[test]
fn reductions_agree_with_their_definition_and_between_instruction_sets() {
    for shape in [(1, 1, 1), (3, 17, 1), (5, 64, 1), (2, 131, 1), (3, 5, 33), (1, 4, 16)] {
        let (outer, axis, inner) = shape;
        let x: Vec<f32> = (0..outer * axis * inner).map(|i| 1.0 + ((i * 37) % 101) as f32 / 1000.0).collect();
        for op in OPS {
            let scalar = reduce(Isa::Scalar, op, &x, shape);
            for o in 0..outer {
                for i in 0..inner {
                    let values = (0..axis).map(|a| f64::from(x[(o * axis + a) * inner + i]));
                    let want = match op {
                        ReduceOp::Sum => values.sum(),
                        ReduceOp::Mean => values.sum::<f64>() / axis as f64,
                        ReduceOp::Max => values.fold(f64::NEG_INFINITY, f64::max),
                        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
                        ReduceOp::Prod => values.product(),
                    };
                    let got = f64::from(scalar[o * inner + i]);
                    assert!(
                        (got - want).abs() <= 1e-5 * want.abs(),
                        "{op:?} {shape:?}: {got} against {want}"
                    );
                }
            }
            for isa in Isa::available() {
                assert_eq!(reduce(isa, op, &x, shape), scalar, "{isa} {op:?} {shape:?}");
            }
        }
    }
}

#[test]
fn nan_spreads_through_maximum_and_minimum() {
    for at in [0, 15, 16, 40] {
        let mut x = vec![1.0f32; 41];
        x[at] = f32::NAN;
        for isa in Isa::available() {
            assert!(reduce(isa, ReduceOp::Max, &x, (1, 41, 1))[0].is_nan());
            assert!(reduce(isa, ReduceOp::Min, &x, (1, 41, 1))[0].is_nan());
            assert!(reduce(isa, ReduceOp::Max, &x, (1, 1, 41))[at].is_nan());
        }
    }
}

#[test]
fn integers_reduce_exactly() {
    let x = [i64::MAX - 1, 1, -5, 7, 2, 9];
    for isa in Isa::available() {
        let run = |op| {
            let mut out = [0i64; 3];
            let args = IntegerReduceArgs {
                op,
                dtype: IntegerType::I64,
                x: x.as_ptr().cast(),
                outer_stride: 6,
                axis_stride: 3,
                outer: 1,
                axis: 2,
                inner: 3,
                out: out.as_mut_ptr().cast(),
            };
            // SAFETY: the arrays hold the shape.
            unsafe { reduce_integer_entry(isa).expect("a scalar row exists")(&args, 0) };
            out
        };
        assert_eq!(run(ReduceOp::Sum), [i64::MIN + 5, 3, 4]);
        assert_eq!(run(ReduceOp::Max), [i64::MAX - 1, 2, 9]);
        assert_eq!(run(ReduceOp::Min), [7, 1, -5]);
        assert_eq!(run(ReduceOp::Prod)[1..], [2, -45]);
        assert_eq!(run(ReduceOp::Mean)[1..], [1, 2]);
    }
}

#[test]
fn running_sums_and_counters() {
    let x = [1.0f32, 2.0, 3.0];
    for isa in Isa::available() {
        let run = |exclusive, reverse| {
            let mut y = [0.0f32; 3];
            let args = CumsumArgs {
                dtype: NumberType::F32,
                x: x.as_ptr().cast(),
                x_stride: 3,
                y: y.as_mut_ptr().cast(),
                y_stride: 3,
                cols: 3,
                exclusive,
                reverse,
            };
            // SAFETY: both arrays hold one row.
            unsafe { cumsum_entry(isa).expect("a scalar row exists")(&args, 0) };
            y
        };
        assert_eq!(run(false, false), [1.0, 3.0, 6.0]);
        assert_eq!(run(true, false), [0.0, 1.0, 3.0]);
        assert_eq!(run(false, true), [6.0, 5.0, 3.0]);
        assert_eq!(run(true, true), [5.0, 3.0, 0.0]);
        let mut out = [0i32; 4];
        let args =
            IotaArgs { dtype: NumberType::I32, out: out.as_mut_ptr().cast(), n: 4, start: 3, step: -2 };
        // SAFETY: the array holds `n` elements.
        unsafe { iota_entry(isa).expect("a scalar row exists")(&args, 0) };
        assert_eq!(out, [3, 1, -1, -3]);
    }
}
