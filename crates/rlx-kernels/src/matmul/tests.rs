use super::*;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn every_element_is_a_fused_sum_in_order_on_every_isa() {
    let sizes = [(1, 1, 1), (1, 33, 7), (5, 31, 128), (7, 64, 129), (48, 32, 1), (49, 65, 300), (3, 5, 0)];
    for (m, n, k) in sizes {
        for transposed in 0..4 {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let (a_row, a_column) = if transposed & 1 == 1 { (1, m) } else { (k, 1) };
            let (b_row, b_column) = if transposed & 2 == 2 { (1, k) } else { (n, 1) };
            let mut want = vec![0.0f32; m * n];
            for i in 0..m {
                for j in 0..n {
                    want[i * n + j] = (0..k).fold(0.0, |sum, p| {
                        a[i * a_row + p * a_column].mul_add(b[p * b_row + j * b_column], sum)
                    });
                }
            }
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; m * n];
                let args = MatMulArgs {
                    a: a.as_ptr(),
                    a_row,
                    a_column,
                    b: b.as_ptr(),
                    b_row,
                    b_column,
                    out: out.as_mut_ptr(),
                    m,
                    n,
                    k,
                };
                let entry = matmul_entry(isa).unwrap();
                for tile in 0..args.tiles() {
                    // SAFETY: the vectors have the sizes that the strides reach; one thread.
                    unsafe { entry(&args, tile) };
                }
                let same = out.iter().zip(&want).all(|(x, y)| x.to_bits() == y.to_bits());
                assert!(same, "{isa} m {m} n {n} k {k} transposed {transposed}");
            }
        }
    }
}
