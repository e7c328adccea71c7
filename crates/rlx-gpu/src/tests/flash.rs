//! Attention over several units of keys: a row has the same bits however its sequence is cut into runs and whatever runs with it.

use super::products::numbers;
use crate::emulated;
use rlx::backend::Backend;
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompiledGraph, Session, State, TensorArg};
use rlx_graph::Graph;
use rlx_tensor::{DimBinding, Tensor};
use std::sync::Arc;

/// What an attention over a cache is like.
pub(super) struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    more: &'static str,
    dtype: &'static str,
}

/// One head a key, seven of which programs take two rows, a window with a cap, and heads wider than a program has lanes.
pub(super) const HEADS: &[Heads] = &[
    Heads { heads: 2, kv_heads: 2, head_dim: 8, more: "window=none, softcap=none", dtype: "f32" },
    Heads { heads: 7, kv_heads: 1, head_dim: 10, more: "window=none, softcap=none", dtype: "f16" },
    Heads { heads: 4, kv_heads: 2, head_dim: 12, more: "window=70, softcap=20.5", dtype: "bf16" },
    Heads { heads: 3, kv_heads: 1, head_dim: 96, more: "window=none, softcap=none", dtype: "f32" },
];

/// Tokens of the longest sequence: two units of keys and some.
const TOKENS: usize = 270;

impl Heads {
    pub fn graph(&self) -> Graph {
        let Heads { heads, kv_heads, head_dim, more, dtype } = self;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let text = format!(
            "graph \"heads\" {{
  state @kc : {dtype}[12, {kv_heads}, {head_dim}, 64]
  state @vc : {dtype}[12, {kv_heads}, 64, {head_dim}]
  input @q : f32[rows, {q}]
  input @k : f32[rows, {kv}]
  input @v : f32[rows, {kv}]
  input @starts : i32[batch + 1]
  input @past : i32[batch]
  input @table : i32[batch, 5]
  %8 : f32[rows, {q}] = attention(@q, @k, @v, @starts, @past, @table, @kc, @vc) {{heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}, scale=0.3, causal=true, {more}, mask=false, cache=true}}
  return \"y\": %8
}}"
        );
        text.parse().unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    /// Runs tokens `from .. to` of sequences of which each begins with as many tokens as the other.
    fn run(&self, compiled: &CompiledGraph, state: &mut State, parts: &[(usize, usize)]) -> Vec<f32> {
        let width = |heads: usize| heads * self.head_dim;
        let pick = |seed: u32, heads: usize| {
            let all = |sequence: usize| numbers(TOKENS * width(heads), seed + 10 * sequence as u32);
            let own = parts.iter().enumerate();
            let rows: Vec<f32> = own
                .flat_map(|(s, &(from, to))| all(s)[from * width(heads)..to * width(heads)].to_vec())
                .collect();
            // Exact in f64's upper half: reference evaluation takes a number just above a tie for the tie when it rounds to 16 bits.
            let rows: Vec<f32> = rows.into_iter().map(|x| (x * 4096.0).round() / 4096.0).collect();
            Tensor::from_slice(&[rows.len() / width(heads), width(heads)], &rows).unwrap()
        };
        let mut starts = vec![0i32];
        parts.iter().for_each(|(from, to)| starts.push(starts[starts.len() - 1] + (to - from) as i32));
        let past: Vec<i32> = parts.iter().map(|(from, _)| *from as i32).collect();
        let table: Vec<i32> = [3, 0, 7, 5, 9, 1, 8, 2, 6, 4][..5 * parts.len()].to_vec();
        let named = [
            ("q", pick(1, self.heads)),
            ("k", pick(2, self.kv_heads)),
            ("v", pick(3, self.kv_heads)),
            ("starts", Tensor::from_slice(&[starts.len()], &starts).unwrap()),
            ("past", Tensor::from_slice(&[past.len()], &past).unwrap()),
            ("table", Tensor::from_slice(&[past.len(), 5], &table).unwrap()),
        ];
        let named: Vec<(&str, TensorArg<'_>)> = named.iter().map(|(n, t)| (*n, t.into())).collect();
        compiled.run_with(state, &named).unwrap()[0].1.as_slice::<f32>().unwrap().to_vec()
    }
}

/// What a prompt of somewhat more than a unit, one token and two more give.
pub(super) fn bits(heads: &Heads, backend: &Arc<dyn Backend>) -> Vec<u32> {
    let compiled = Session::with_backend(Arc::clone(backend)).compile(&heads.graph()).unwrap();
    let mut state = compiled.new_state(&DimBinding::new()).unwrap();
    let parts = [(0, 130), (130, 131), (131, 133)];
    let all = parts.iter().flat_map(|&part| heads.run(&compiled, &mut state, &[part]));
    all.map(f32::to_bits).collect()
}

pub(super) fn check(heads: &Heads, backend: &Arc<dyn Backend>) {
    let compile = |backend: &Arc<dyn Backend>| {
        let compiled = Session::with_backend(Arc::clone(backend)).compile(&heads.graph()).unwrap();
        let state = compiled.new_state(&DimBinding::new()).unwrap();
        (compiled, state)
    };
    let name = format!("{} heads of {} on {}", heads.heads, heads.head_dim, backend.name());
    let row = heads.heads * heads.head_dim;
    let (compiled, mut state) = compile(backend);
    let whole = heads.run(&compiled, &mut state, &[(0, TOKENS)]);
    let (plain, mut state) = compile(&(Arc::new(ReferenceBackend::default()) as Arc<dyn Backend>));
    let expected = heads.run(&plain, &mut state, &[(0, TOKENS)]);
    for (i, (a, b)) in whole.iter().zip(&expected).enumerate() {
        // Powers of scores that are off by a few roundings.
        assert!((a - b).abs() <= 1e-5, "{name}: element {i} is {a}, expected {b}");
    }
    // A prompt in two parts, single tokens, and a second sequence beside all of them.
    let (compiled, mut state) = compile(backend);
    for ((from, to), other) in [
        ((0, 131), (0, 6)),
        ((131, 264), (6, 7)),
        ((264, 265), (7, 8)),
        ((265, 268), (8, 9)),
        ((268, 270), (9, 30)),
    ] {
        let found = heads.run(&compiled, &mut state, &[(from, to), other]);
        let own = &found[..(to - from) * row];
        let same = own.iter().zip(&whole[from * row..]).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(same.map(|i| (i / row, i % row)), None, "{name}: tokens {from} .. {to} have other bits");
    }
}

#[test]
fn a_row_has_the_same_bits_however_its_sequence_is_cut_by_the_interpreter() {
    HEADS.iter().for_each(|heads| check(heads, &emulated()));
}

#[cfg(feature = "wgpu")]
#[test]
fn a_row_has_the_same_bits_however_its_sequence_is_cut_on_the_first_adapter() {
    let backend = crate::provider().unwrap().open(0, &rlx::config::Config::default()).unwrap();
    HEADS.iter().for_each(|heads| check(heads, &backend));
}
