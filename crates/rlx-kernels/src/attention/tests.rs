use super::*;
use crate::isa::Isa;
use crate::isa::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use rlx_tensor::quant::encode_cache_group;

#[derive(Clone)]
struct Case {
    lens: Vec<usize>,
    past: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    left: usize,
    right: usize,
    softcap: f32,
    mask: bool,
}

impl Case {
    fn new(lens: &[usize], heads: usize, kv_heads: usize, head_dim: usize) -> Case {
        Case {
            lens: lens.to_vec(),
            past: vec![0; lens.len()],
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            left: usize::MAX,
            right: 0,
            softcap: 0.0,
            mask: false,
        }
    }

    fn starts(&self) -> Vec<i32> {
        let mut starts = vec![0];
        for len in &self.lens {
            starts.push(starts[starts.len() - 1] + *len as i32);
        }
        starts
    }

    fn rows(&self) -> usize {
        self.lens.iter().sum()
    }

    fn longest(&self) -> usize {
        self.lens.iter().zip(&self.past).map(|(l, p)| l + p).max().unwrap_or(0)
    }
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Everything a run reads: rows by sequence and absolute position.
struct Data {
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    mask: Vec<f32>,
    mask_width: usize,
}

fn data(case: &Case) -> Data {
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    for (b, (len, past)) in case.lens.iter().zip(&case.past).enumerate() {
        let n = len + past;
        q.push(noise(n * case.heads * case.head_dim, 3 * b as u32 + 1));
        k.push(noise(n * case.kv_heads * case.head_dim, 3 * b as u32 + 2));
        v.push(noise(n * case.kv_heads * case.value_dim, 3 * b as u32 + 3));
    }
    let mask_width = case.longest();
    let mut mask = noise(case.lens.len() * case.heads * mask_width * mask_width, 77);
    for (i, x) in mask.iter_mut().enumerate() {
        if i % 7 == 3 {
            *x = f32::NEG_INFINITY;
        }
    }
    Data { q, k, v, mask, mask_width }
}

fn round(x: f32, dtype: CacheDtype) -> f32 {
    match dtype {
        CacheDtype::F32 => x,
        CacheDtype::F16 => f16_to_f32(f32_to_f16(x)),
        CacheDtype::Bf16 => bf16_to_f32(f32_to_bf16(x)),
        CacheDtype::Q8 => unreachable!("rounds groups"),
    }
}

fn scale_of(case: &Case) -> f32 {
    1.0 / (case.head_dim as f32).sqrt()
}

/// The definition in f64, for rows from `past` on.
fn reference(case: &Case, data: &Data, dtype: CacheDtype) -> Vec<f32> {
    let mut out = Vec::new();
    let group = case.heads / case.kv_heads;
    for (b, (len, past)) in case.lens.iter().zip(&case.past).enumerate() {
        let total = len + past;
        for i in 0..*len {
            let p = past + i;
            for h in 0..case.heads {
                let kv = h / group;
                let (lo, hi) = (p.saturating_sub(case.left), p.saturating_add(case.right).min(total - 1));
                let mut scores = Vec::new();
                for j in lo..=hi {
                    let mut x = 0.0f64;
                    for d in 0..case.head_dim {
                        let a = data.q[b][(p * case.heads + h) * case.head_dim + d];
                        let c = data.k[b][(j * case.kv_heads + kv) * case.head_dim + d];
                        x += f64::from(a) * f64::from(round(c, dtype));
                    }
                    x *= f64::from(scale_of(case));
                    if case.softcap != 0.0 {
                        let cap = f64::from(case.softcap);
                        x = cap * (x / cap).tanh();
                    }
                    if case.mask {
                        let w = data.mask_width;
                        x += f64::from(data.mask[((b * case.heads + h) * w + i) * w + j]);
                    }
                    scores.push(x);
                }
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut sum = 0.0;
                let mut row = vec![0.0f64; case.value_dim];
                if top != f64::NEG_INFINITY {
                    for (x, j) in scores.iter().zip(lo..) {
                        let e = (x - top).exp();
                        sum += e;
                        for (d, y) in row.iter_mut().enumerate() {
                            let c = data.v[b][(j * case.kv_heads + kv) * case.value_dim + d];
                            *y += e * f64::from(round(c, dtype));
                        }
                    }
                }
                out.extend(row.iter().map(|y| if sum == 0.0 { 0.0 } else { (y / sum) as f32 }));
            }
        }
    }
    out
}

/// Rows of this run, side by side with padding, as a column slice of a wider buffer.
fn strided(case: &Case, source: &[Vec<f32>], width: usize, stride: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; (case.rows() + 1) * stride];
    let mut row = 0;
    for (b, (len, past)) in case.lens.iter().zip(&case.past).enumerate() {
        for i in 0..*len {
            let at = (past + i) * width;
            out[row * stride..row * stride + width].copy_from_slice(&source[b][at..at + width]);
            row += 1;
        }
    }
    out
}

struct Cache {
    k: Vec<u8>,
    v: Vec<u8>,
    table: Vec<i32>,
    table_width: usize,
    dtype: CacheDtype,
}

impl Cache {
    fn new(case: &Case, dtype: CacheDtype) -> Cache {
        let table_width = case.longest().div_ceil(BLOCK) + 1;
        let blocks = table_width * case.lens.len();
        let fill = |dim: usize| vec![0xffu8; blocks * case.kv_heads * BLOCK * dtype.bytes(dim)];
        let table = (0..blocks).map(|i| ((i * 7 + 3) % blocks) as i32).collect::<Vec<_>>();
        let mut sorted = table.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let table = if sorted.len() == blocks { table } else { (0..blocks as i32).rev().collect() };
        Cache { k: fill(case.head_dim), v: fill(case.value_dim), table, table_width, dtype }
    }

    /// Appends rows `past..past + len` of every sequence.
    fn append(&mut self, case: &Case, data: &Data, isa: Isa) {
        let (k_width, v_width) = (case.kv_heads * case.head_dim, case.kv_heads * case.value_dim);
        let k = strided(case, &data.k, k_width, k_width + 3);
        let v = strided(case, &data.v, v_width, v_width + 5);
        let starts = case.starts();
        let past: Vec<i32> = case.past.iter().map(|p| *p as i32).collect();
        let args = AppendArgs {
            k: k.as_ptr(),
            k_stride: k_width + 3,
            v: v.as_ptr(),
            v_stride: v_width + 5,
            seq_starts: starts.as_ptr(),
            batch: case.lens.len(),
            past: past.as_ptr(),
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            value_dim: case.value_dim,
            k_cache: self.k.as_mut_ptr(),
            v_cache: self.v.as_mut_ptr(),
            dtype: self.dtype,
            block_table: self.table.as_ptr(),
            table_width: self.table_width,
            stored_heads: (0, case.kv_heads),
            stored_chunk: None,
        };
        let run = append_entry(isa).expect("a scalar row exists");
        // SAFETY: the vectors above hold what the arguments say.
        unsafe {
            for tile in 0..args.tiles() {
                run(&args, tile);
            }
        }
    }

    fn keys(&self) -> Keys {
        Keys::Cache {
            k: self.k.as_ptr(),
            v: self.v.as_ptr(),
            dtype: self.dtype,
            block_table: self.table.as_ptr(),
            table_width: self.table_width,
        }
    }
}

/// Runs the rows of `case`; `cache` must hold all its keys. `split` runs chunk by chunk and merges.
fn attend(case: &Case, data: &Data, cache: Option<&Cache>, isa: Isa, split: bool) -> Vec<f32> {
    let q_width = case.heads * case.head_dim;
    let out_width = case.heads * case.value_dim;
    let (k_width, v_width) = (case.kv_heads * case.head_dim, case.kv_heads * case.value_dim);
    let q = strided(case, &data.q, q_width, q_width + 7);
    let k = strided(case, &data.k, k_width, k_width + 3);
    let v = strided(case, &data.v, v_width, v_width + 5);
    let starts = case.starts();
    let past: Vec<i32> = case.past.iter().map(|p| *p as i32).collect();
    let rows = case.rows();
    let mut out = vec![f32::NAN; (rows + 1) * (out_width + 2)];
    let rows_keys = Keys::Rows { k: k.as_ptr(), k_stride: k_width + 3, v: v.as_ptr(), v_stride: v_width + 5 };
    let w = data.mask_width;
    let mut args = AttentionArgs {
        q: q.as_ptr(),
        q_stride: q_width + 7,
        out: out.as_mut_ptr(),
        out_stride: out_width + 2,
        keys: cache.map_or(rows_keys, Cache::keys),
        seq_starts: starts.as_ptr(),
        batch: case.lens.len(),
        past: if cache.is_some() { past.as_ptr() } else { std::ptr::null() },
        heads: case.heads,
        kv_heads: case.kv_heads,
        head_dim: case.head_dim,
        value_dim: case.value_dim,
        scale: scale_of(case),
        softcap: case.softcap,
        left: case.left,
        right: case.right,
        mask: if case.mask { data.mask.as_ptr() } else { std::ptr::null() },
        mask_strides: [case.heads * w * w, w * w, w],
        partials: std::ptr::null_mut(),
        chunks: if split { case.longest().div_ceil(CHUNK) + 1 } else { 0 },
        scratch: std::ptr::null_mut(),
    };
    let mut scratch = vec![f32::NAN; args.scratch_floats()];
    let mut partials = vec![f32::NAN; args.partial_floats(rows)];
    args.scratch = scratch.as_mut_ptr();
    args.partials = partials.as_mut_ptr();
    let run = attention_entry(isa).expect("a scalar row exists");
    // SAFETY: the vectors above hold what the arguments say.
    unsafe {
        for tile in (0..args.tiles()).rev() {
            run(&args, tile);
        }
        if split {
            for row in 0..rows {
                merge_entry(isa).expect("a scalar row exists")(&args, row);
            }
        }
    }
    (0..rows).flat_map(|r| out[r * (out_width + 2)..][..out_width].to_vec()).collect()
}

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= 4e-6 * b.abs().max(1.0), "{what}: element {i}: {a} against {b}");
    }
}

fn assert_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i}: {a} against {b}");
    }
}

fn cases() -> Vec<Case> {
    let ragged = [1, 70, 2, 0, 33, 129];
    vec![
        Case::new(&ragged, 4, 4, 16),
        Case { right: usize::MAX, ..Case::new(&ragged, 3, 1, 32) },
        Case { left: left_of_window(9), ..Case::new(&ragged, 6, 2, 24) },
        Case { left: 5, right: 4, ..Case::new(&[80, 13], 2, 2, 8) },
        Case { softcap: 1.5, value_dim: 19, ..Case::new(&[65, 5], 4, 1, 7) },
        Case { mask: true, right: usize::MAX, ..Case::new(&[40, 66], 2, 1, 80) },
        Case { left: left_of_window(70), ..Case::new(&[1100], 2, 1, 16) },
        Case::new(&[1030, 3], 1, 1, 33),
    ]
}

#[test]
fn agrees_with_the_definition_and_between_instruction_sets() {
    for (n, case) in cases().iter().enumerate() {
        let data = data(case);
        let want = reference(case, &data, CacheDtype::F32);
        let scalar = attend(case, &data, None, Isa::Scalar, false);
        assert_close(&scalar, &want, &format!("case {n}"));
        for isa in Isa::available() {
            assert_bits(&attend(case, &data, None, isa, false), &scalar, &format!("case {n} {isa}"));
        }
    }
}

#[test]
fn a_cache_of_each_type_agrees_with_the_definition_on_rounded_keys() {
    let isa = Isa::detect();
    for dtype in [CacheDtype::F32, CacheDtype::F16, CacheDtype::Bf16] {
        for (n, case) in cases().iter().enumerate() {
            let data = data(case);
            let mut cache = Cache::new(case, dtype);
            cache.append(case, &data, isa);
            let got = attend(case, &data, Some(&cache), isa, false);
            assert_close(&got, &reference(case, &data, dtype), &format!("case {n} {dtype:?}"));
            if dtype == CacheDtype::F32 {
                assert_bits(
                    &got,
                    &attend(case, &data, None, isa, false),
                    &format!("case {n} rows and cache"),
                );
            }
            let split = attend(case, &data, Some(&cache), isa, true);
            assert_bits(&split, &got, &format!("case {n} {dtype:?} split"));
            for other in Isa::available() {
                let got_there = attend(case, &data, Some(&cache), other, false);
                assert_bits(&got_there, &got, &format!("case {n} {dtype:?} {other}"));
            }
        }
    }
}

/// The values that a cache of integers gives back, and half of each one's step.
fn through_integers(rows: &[Vec<f32>]) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let of_row = |row: &Vec<f32>| {
        let groups = row.as_chunks::<CACHE_GROUP>().0.iter().map(encode_cache_group);
        let stored = groups.map(|(scale, integers)| (f16_to_f32(scale), integers));
        let (mut values, mut errors) = (Vec::new(), Vec::new());
        for (scale, integers) in stored {
            values.extend(integers.map(|integer| scale * f32::from(integer)));
            errors.extend([scale / 2.0; CACHE_GROUP]);
        }
        (values, errors)
    };
    rows.iter().map(of_row).unzip()
}

fn cases_of_whole_groups() -> Vec<Case> {
    let ragged = [1, 70, 2, 0, 33, 129];
    vec![
        Case::new(&ragged, 4, 4, 32),
        Case { left: left_of_window(9), value_dim: 64, ..Case::new(&ragged, 6, 2, 96) },
        Case { softcap: 1.5, ..Case::new(&[65, 5], 7, 1, 64) },
        Case { mask: true, right: usize::MAX, ..Case::new(&[40, 66], 2, 1, 32) },
        Case { left: left_of_window(70), ..Case::new(&[1100], 9, 3, 32) },
    ]
}

#[test]
fn a_cache_of_integers_has_the_bits_of_an_f32_cache_of_its_values() {
    let isa = Isa::detect();
    for (n, case) in cases_of_whole_groups().iter().enumerate() {
        let data = data(case);
        let mut cache = Cache::new(case, CacheDtype::Q8);
        cache.append(case, &data, isa);
        let rounded = Data {
            q: data.q.clone(),
            k: through_integers(&data.k).0,
            v: through_integers(&data.v).0,
            mask: data.mask.clone(),
            mask_width: data.mask_width,
        };
        let mut plain = Cache::new(case, CacheDtype::F32);
        plain.append(case, &rounded, isa);
        let want = attend(case, &rounded, Some(&plain), isa, false);
        for isa in Isa::available() {
            for split in [false, true] {
                let got = attend(case, &data, Some(&cache), isa, split);
                assert_bits(&got, &want, &format!("case {n} {isa} {split}"));
            }
        }
    }
}

/// Scores move by at most `e = scale * sum |q| * step / 2`, so weights by a factor within `e^(2 e)` and outputs by at most `(e^(2 e) - 1)`
/// of the largest value, and by half a step of the values.
#[test]
fn a_cache_of_integers_is_as_near_to_an_f32_cache_as_its_steps_allow() {
    let isa = Isa::detect();
    for (n, case) in cases_of_whole_groups().iter().enumerate() {
        let data = data(case);
        let mut caches = [CacheDtype::Q8, CacheDtype::F32].map(|dtype| Cache::new(case, dtype));
        caches.iter_mut().for_each(|cache| cache.append(case, &data, isa));
        let [found, expected] = caches.each_ref().map(|cache| attend(case, &data, Some(cache), isa, false));
        let largest = |rows: &[Vec<f32>]| rows.iter().flatten().fold(0.0f32, |m, x| m.max(x.abs()));
        let (key_error, value_error) =
            (largest(&through_integers(&data.k).1), largest(&through_integers(&data.v).1));
        let heads = data.q.iter().flat_map(|rows| rows.chunks(case.head_dim));
        let query = heads.map(|q| q.iter().map(|x| x.abs()).sum::<f32>()).fold(0.0, f32::max);
        let moved = scale_of(case) * query * key_error;
        let bound = value_error + (2.0 * moved).exp_m1() * largest(&data.v);
        let worst = found.iter().zip(&expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst > 0.0 && worst <= bound, "case {n}: {worst}, at most {bound}");
    }
}

#[test]
fn a_sequence_alone_has_the_bits_it_has_in_a_batch() {
    let isa = Isa::detect();
    for (n, case) in cases().iter().enumerate().filter(|(_, c)| !c.mask) {
        let all = data(case);
        let together = attend(case, &all, None, isa, false);
        let width = case.heads * case.value_dim;
        let starts = case.starts();
        for b in 0..case.lens.len() {
            let alone = Case { lens: vec![case.lens[b]], past: vec![0], ..case.clone() };
            let one = Data {
                q: vec![all.q[b].clone()],
                k: vec![all.k[b].clone()],
                v: vec![all.v[b].clone()],
                mask: Vec::new(),
                mask_width: 0,
            };
            let got = attend(&alone, &one, None, isa, false);
            let want = &together[starts[b] as usize * width..starts[b + 1] as usize * width];
            assert_bits(&got, want, &format!("case {n} sequence {b}"));
        }
    }
}

#[test]
fn decoding_token_by_token_has_the_bits_of_prefilling() {
    let isa = Isa::detect();
    let shapes = [
        Case::new(&[75, 20], 6, 2, 32),
        Case { left: left_of_window(11), softcap: 3.0, ..Case::new(&[70, 9], 4, 4, 20) },
        Case { left: left_of_window(600), ..Case::new(&[1027, 530], 3, 1, 16) },
        Case { left: left_of_window(90), ..Case::new(&[140, 9], 7, 1, 64) },
    ];
    for dtype in [CacheDtype::F32, CacheDtype::F16, CacheDtype::Bf16, CacheDtype::Q8] {
        let whole = |case: &&Case| dtype != CacheDtype::Q8 || case.head_dim.is_multiple_of(CACHE_GROUP);
        for (n, case) in shapes.iter().filter(whole).enumerate() {
            let all = data(case);
            let mut cache = Cache::new(case, dtype);
            cache.append(case, &all, isa);
            let prefilled = attend(case, &all, Some(&cache), isa, false);
            let width = case.heads * case.value_dim;
            let starts = case.starts();
            let mut grown = Cache::new(case, dtype);
            for t in 0..case.longest() {
                let lens: Vec<usize> = case.lens.iter().map(|len| usize::from(t < *len)).collect();
                let past = case.lens.iter().map(|len| t.min(*len)).collect();
                let step = Case { lens: lens.clone(), past, ..case.clone() };
                grown.append(&step, &all, isa);
                if t % 97 != 0 && t > 70 && t < case.longest() - 3 {
                    continue;
                }
                let got = attend(&step, &all, Some(&grown), isa, t % 2 == 1);
                let mut row = 0;
                for (b, len) in lens.iter().enumerate() {
                    if *len == 1 {
                        let at = (starts[b] as usize + t) * width;
                        let got = &got[row * width..(row + 1) * width];
                        assert_bits(
                            got,
                            &prefilled[at..at + width],
                            &format!("shape {n} {dtype:?} token {t}"),
                        );
                        row += 1;
                    }
                }
            }
        }
    }
}

#[test]
fn chunked_prefill_has_the_bits_of_one_prefill() {
    let isa = Isa::detect();
    let case = Case::new(&[150], 8, 1, 16);
    let all = data(&case);
    let mut cache = Cache::new(&case, CacheDtype::Bf16);
    cache.append(&case, &all, isa);
    let want = attend(&case, &all, Some(&cache), isa, false);
    let tail = Case { lens: vec![87], past: vec![63], ..case.clone() };
    let got = attend(&tail, &all, Some(&cache), isa, true);
    assert_bits(&got, &want[63 * case.heads * case.value_dim..], "tail");
}

#[test]
fn a_row_that_sees_nothing_gives_zeros_and_masked_keys_leave_no_trace() {
    let case = Case { mask: true, right: usize::MAX, ..Case::new(&[70], 2, 1, 16) };
    let mut all = data(&case);
    all.mask.fill(f32::NEG_INFINITY);
    let w = all.mask_width;
    all.mask[w..w + 3].fill(0.0);
    for isa in Isa::available() {
        let got = attend(&case, &all, None, isa, false);
        let width = case.heads * case.value_dim;
        assert!(got[..width].iter().all(|x| x.to_bits() == 0));
        assert!(got[width..width + 16].iter().all(|x| x.is_finite()));
        assert!(got[width..width + 16].iter().any(|x| *x != 0.0));
        assert!(got[2 * width..].iter().all(|x| x.to_bits() == 0));
    }
}

#[test]
fn rows_have_distinct_names() {
    let mut names: Vec<String> = ATTENTION.iter().chain(&MERGE).map(crate::isa::Row::name).collect();
    names.extend(APPEND.iter().map(crate::isa::Row::name));
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
