//! The graphs that are timed. Operands are params, so that they are on the device before a run; results are reduced to little.

use rlx_graph::hir::{AttentionOperands, CacheOperands, GatedMlp, HirMut};
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::attention::{Attention, BLOCK};
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::reduce::ReduceOp;
use rlx_graph::ops::rms_norm::RmsNorm;
use rlx_graph::ops::rope::RopeStyle;
use rlx_graph::ops::unary::UnaryOp;
use rlx_graph::{Graph, GraphError, HirModule, ParseError, ValueId};
use rlx_tensor::{DType, Dim};

type Made = Result<Graph, GraphError>;

/// Elements of a row of elementwise work.
pub const WIDTH: usize = 4096;

fn rows(build: impl FnOnce(&mut HirMut<'_>, ValueId) -> Result<ValueId, GraphError>, count: usize) -> Made {
    let mut module = HirModule::new("rows");
    let mut hir = module.edit();
    let x = hir.param("x", &[count, WIDTH], DType::F32)?;
    let y = build(&mut hir, x)?;
    let sums = hir.reduce(ReduceOp::Sum, y, &[1], false)?;
    module.finish(&[("sums", sums)])
}

/// Sums of rows, to be taken off the graphs below.
pub fn sums(count: usize) -> Made {
    rows(|_, x| Ok(x), count)
}

/// Every element read and written.
pub fn copy(count: usize) -> Made {
    // A transposition, so that no pass removes it, of axes that keep rows whole.
    rows(
        |hir, x| {
            let halves = hir.reshape(x, &[2, count / 2, WIDTH].map(Dim::Known))?;
            let swapped = hir.transpose(halves, &[1, 0, 2])?;
            hir.reshape(swapped, &[count, WIDTH].map(Dim::Known))
        },
        count,
    )
}

/// `gelu(x * 3 + 1)`
pub fn elementwise(count: usize) -> Made {
    rows(
        |hir, x| {
            let scaled = hir.scale(x, 3.0)?;
            let shifted = hir.scalar(BinaryOp::Add, scaled, 1.0)?;
            let bent = hir.activation(shifted, ActivationKind::Gelu)?;
            // Not of elements alone, or it would become part of the sum.
            hir.unary(UnaryOp::Abs, bent)
        },
        count,
    )
}

/// Root-mean-square normalisation.
pub fn norm(count: usize) -> Made {
    rows(|hir, x| hir.rms_norm(plain_norm(), x, "weight", WIDTH, DType::F32), count)
}

fn plain_norm() -> RmsNorm {
    RmsNorm { eps: 1e-6, unit_offset: false, groups: 1, residual: false }
}

/// `layers` square linear layers of one row after another.
pub fn vectors(width: usize, layers: usize, dtype: DType) -> Made {
    let mut module = HirModule::new("vectors");
    let mut hir = module.edit();
    let mut x = hir.input("x", &[1, width].map(Dim::Known), DType::F32)?;
    for layer in 0..layers {
        x = hir.linear(x, &format!("w{layer}"), (width, width), None, dtype)?;
    }
    module.finish(&[("y", x)])
}

/// A square product with weights of this type, its rows summed.
pub fn product(n: usize, dtype: DType) -> Made {
    let mut module = HirModule::new("product");
    let mut hir = module.edit();
    let x = hir.param("x", &[n, n], DType::F32)?;
    let y = hir.linear(x, "w", (n, n), None, dtype)?;
    let sums = hir.reduce(ReduceOp::Sum, y, &[1], false)?;
    module.finish(&[("sums", sums)])
}

/// As many such products of the same rows, which one layer makes ready once.
pub fn products(n: usize, count: usize, dtype: DType) -> Result<Graph, ParseError> {
    let weights: Vec<String> = (0..count).map(|i| format!("@w{i}")).collect();
    let params: String = weights.iter().map(|w| format!("  param {w} : {dtype}[{n}, {n}]\n")).collect();
    let (first, second, width) = (1 + count, 2 + count, count * n);
    format!(
        "graph \"products\" {{
  param @x : f32[{n}, {n}]
{params}  %{first} : f32[{n}, {width}] = linear(@x, {}) {{parts={count}, transposed=false, bias=false, activation=identity, gated=false, residual=false}}
  %{second} : f32[{n}] = reduce(%{first}) {{kind=sum, axes=[1], keep_dims=false}}
  return \"sums\": %{second}
}}",
        weights.join(", ")
    )
    .parse()
}

/// Sizes of a transformer.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inner: usize,
    pub vocab: usize,
}

/// A model's blocks.
struct Blocks<'h, 'g> {
    hir: &'h mut HirMut<'g>,
    sizes: Sizes,
    dtype: DType,
    starts: ValueId,
}

impl Blocks<'_, '_> {
    fn linear(&mut self, x: ValueId, name: &str, n: usize, k: usize) -> Result<ValueId, GraphError> {
        self.hir.linear(x, name, (n, k), None, self.dtype)
    }

    /// Attention over what `cache` holds, or over this run's rows in both directions.
    fn attend(
        &mut self,
        x: ValueId,
        layer: usize,
        angles: Option<ValueId>,
        cache: Option<CacheOperands>,
    ) -> Result<ValueId, GraphError> {
        let Sizes { width, heads, kv_heads, head_dim, .. } = self.sizes;
        let (own, shared) = (heads * head_dim, kv_heads * head_dim);
        let mut q = self.linear(x, &format!("{layer}.q"), own, width)?;
        let mut k = self.linear(x, &format!("{layer}.k"), shared, width)?;
        let v = self.linear(x, &format!("{layer}.v"), shared, width)?;
        if let Some(angles) = angles {
            q = self.hir.rope(q, angles, heads, head_dim, RopeStyle::Neox)?;
            k = self.hir.rope(k, angles, kv_heads, head_dim, RopeStyle::Neox)?;
        }
        let op = Attention {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5),
            causal: cache.is_some(),
            window: None,
            softcap: None,
            mask: false,
            cache: false,
        };
        let operands = AttentionOperands { q, k, v, seq_starts: self.starts, mask: None, cache };
        let mixed = self.hir.attention(op, &operands)?;
        self.linear(mixed, &format!("{layer}.o"), width, own)
    }
}

fn integers(hir: &mut HirMut<'_>, name: &str, dim: Dim) -> Result<ValueId, GraphError> {
    hir.input(name, &[dim], DType::I32)
}

/// A sentence encoder with absolute positions left out; f32 weights.
pub fn encoder(sizes: Sizes) -> Made {
    let mut module = HirModule::new("encoder");
    let mut hir = module.edit();
    let ids = integers(&mut hir, "ids", Dim::symbol("rows"))?;
    let starts = integers(&mut hir, "starts", Dim::symbol("batch") + Dim::Known(1))?;
    let dtype = DType::F32;
    let mut x = hir.embedding(ids, "table", sizes.vocab, sizes.width, dtype)?;
    let mut blocks = Blocks { hir: &mut hir, sizes, dtype, starts };
    for layer in 0..sizes.layers {
        let mixed = blocks.attend(x, layer, None, None)?;
        x = blocks.hir.add(x, mixed)?;
        x = blocks.hir.layer_norm(x, &format!("{layer}.norm1"), None, sizes.width, 1e-12, dtype)?;
        let up = blocks.linear(x, &format!("{layer}.up"), sizes.inner, sizes.width)?;
        let bent = blocks.hir.activation(up, ActivationKind::Gelu)?;
        let down = blocks.linear(bent, &format!("{layer}.down"), sizes.width, sizes.inner)?;
        x = blocks.hir.add(x, down)?;
        x = blocks.hir.layer_norm(x, &format!("{layer}.norm2"), None, sizes.width, 1e-12, dtype)?;
    }
    let pooled = hir.pool(x, starts, rlx_graph::ops::pool::PoolKind::Mean)?;
    module.finish(&[("embedding", pooled)])
}

/// A decoder of one sequence with a paged cache of bf16; bf16 weights; the logits of the last row.
pub fn decoder(sizes: Sizes) -> Made {
    let mut module = HirModule::new("decoder");
    let mut hir = module.edit();
    let (rows, blocks_of) = (Dim::symbol("rows"), Dim::symbol("blocks"));
    let ids = integers(&mut hir, "ids", rows.clone())?;
    let positions = integers(&mut hir, "positions", rows)?;
    let starts = integers(&mut hir, "starts", Dim::Known(2))?;
    let past = integers(&mut hir, "past", Dim::Known(1))?;
    let last = integers(&mut hir, "last", Dim::Known(1))?;
    let block_table = hir.input("block_table", &[Dim::Known(1), blocks_of.clone()], DType::I32)?;
    let dtype = DType::BF16;
    let half = sizes.head_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| 1e6f32.powf(-(i as f32) / half as f32)).collect();
    let angles = hir.rope_angles(positions, &frequencies, 1.0)?;
    let mut x = hir.embedding(ids, "table", sizes.vocab, sizes.width, dtype)?;
    for layer in 0..sizes.layers {
        let [heads, dim, block] = [sizes.kv_heads, sizes.head_dim, BLOCK].map(Dim::Known);
        let k_dims = [blocks_of.clone(), heads.clone(), dim.clone(), block.clone()];
        let k_cache = hir.state(&format!("{layer}.k_cache"), &k_dims, dtype)?;
        let v_dims = [blocks_of.clone(), heads, block, dim];
        let v_cache = hir.state(&format!("{layer}.v_cache"), &v_dims, dtype)?;
        let cache = Some(CacheOperands { past, block_table, k_cache, v_cache });
        let inner = hir.rms_norm(plain_norm(), x, &format!("{layer}.norm1"), sizes.width, dtype)?;
        let mut blocks = Blocks { hir: &mut hir, sizes, dtype, starts };
        let mixed = blocks.attend(inner, layer, Some(angles), cache)?;
        x = hir.add(x, mixed)?;
        let inner = hir.rms_norm(plain_norm(), x, &format!("{layer}.norm2"), sizes.width, dtype)?;
        let mlp = GatedMlp {
            gate: format!("{layer}.gate"),
            up: format!("{layer}.up"),
            down: format!("{layer}.down"),
            width: sizes.width,
            inner: sizes.inner,
            activation: ActivationKind::Silu,
            dtype,
        };
        let fed = hir.gated_mlp(inner, &mlp)?;
        x = hir.add(x, fed)?;
    }
    let x = hir.gather(x, last, 0)?;
    let x = hir.rms_norm(plain_norm(), x, "norm", sizes.width, dtype)?;
    let logits = hir.linear(x, "head", (sizes.vocab, sizes.width), None, dtype)?;
    module.finish(&[("logits", logits)])
}
