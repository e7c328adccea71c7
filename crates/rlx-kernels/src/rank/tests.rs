use super::*;

fn argmax(isa: Isa, x: &[f32]) -> i32 {
    let mut out = -1;
    let args = ArgmaxArgs { x: x.as_ptr(), x_stride: 0, cols: x.len(), out: &mut out };
    // SAFETY: one row and one output.
    unsafe { argmax_entry(isa).expect("a scalar row exists")(&args, 0) };
    out
}

fn top_k(isa: Isa, x: &[f32], k: usize) -> (Vec<f32>, Vec<i32>) {
    let (mut values, mut indices) = (vec![0.0; k], vec![-1; k]);
    let args = TopKArgs {
        x: x.as_ptr(),
        x_stride: 0,
        cols: x.len(),
        k,
        values: values.as_mut_ptr(),
        indices: indices.as_mut_ptr(),
    };
    // SAFETY: one row and `k` outputs.
    unsafe { top_k_entry(isa).expect("a scalar row exists")(&args, 0) };
    (values, indices)
}

#[test]
fn the_first_of_equals_wins() {
    for isa in Isa::available() {
        for n in [1, 3, 16, 17, 50, 1000] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 23) as f32).collect();
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|a, b| x[*b].total_cmp(&x[*a]).then(a.cmp(b)));
            assert_eq!(argmax(isa, &x), order[0] as i32, "{isa} {n}");
            let k = n.min(9);
            let (values, indices) = top_k(isa, &x, k);
            for i in 0..k {
                assert_eq!((values[i], indices[i] as usize), (x[order[i]], order[i]), "{isa} {n}");
            }
        }
        assert_eq!(argmax(isa, &[f32::NEG_INFINITY; 20]), 0);
        assert_eq!(argmax(isa, &[1.0, f32::NAN, 3.0, f32::NAN]), 1);
        let negative = [-3.0, -1.0, -2.0];
        assert_eq!(argmax(isa, &negative), 1);
        assert_eq!(top_k(isa, &[f32::NAN, 1.0, f32::NAN, 2.0], 3).1, [0, 2, 3]);
        let mut x = vec![f32::NAN; 40];
        x[30] = f32::NEG_INFINITY;
        assert_eq!(top_k(isa, &x, 2).1, [0, 1]);
        let mut x = vec![1.0; 40];
        x[37] = f32::NAN;
        assert_eq!(top_k(isa, &x, 3).1, [37, 0, 1]);
    }
}
