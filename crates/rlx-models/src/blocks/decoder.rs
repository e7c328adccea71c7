//! What every decoder has: its inputs, its cache, attention over the cache, the head.

use crate::arch::{BuildCx, Built, Decoder, DecoderInfo};
use crate::blocks::net::{Net, RmsNormSpec};
use crate::blocks::rope::{Rope, RopeDefaults};
use crate::error::{ModelError, Result};
use crate::kv::BLOCK_POSITIONS;
use rlx::import::hf::ConfigReader;
use rlx::import::json::Json;
use rlx_graph::ValueId;
use rlx_graph::ops::activation::ActivationKind;
use rlx_graph::ops::attention::Attention;
use rlx_graph::ops::gather::Gather;
use rlx_graph::ops::linear::Linear;
use rlx_graph::ops::rope::{Rope as RopeOp, RopeStyle};
use rlx_graph::ops::rope_angles::RopeAngles;
use rlx_tensor::quant::{CACHE_GROUP, CACHE_GROUP_BYTES};
use rlx_tensor::{DType, Dim, Shape, Tensor};

/// Sizes of a decoder.
#[derive(Debug, Clone)]
pub struct DecoderSizes {
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Elements of a row of activations.
    pub width: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Most positions.
    pub max_positions: usize,
    /// Added to mean squares.
    pub eps: f64,
    /// The head is the embedding.
    pub tied: bool,
}

/// Fields of every config that do not change what the model computes.
pub const IRRELEVANT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Marks the fields of [`IRRELEVANT`], and those of other programs, as understood.
pub fn ignore_irrelevant(cfg: &ConfigReader) -> Result<()> {
    cfg.ignore(IRRELEVANT);
    // A name with a dot, which `ignore` would take for a path.
    cfg.optional::<Json>("transformers.js_config")?;
    Ok(())
}

const MAX_LAYERS: usize = 4096;

impl DecoderSizes {
    /// Reads the fields that llama and its relatives share.
    pub fn read(cfg: &ConfigReader, defaults: FamilyDefaults) -> Result<Self> {
        ignore_irrelevant(cfg)?;
        cfg.must_be("rope_interleaved", false)?;
        let width = cfg.required_in("hidden_size", 1..=1 << 20)?;
        let heads = cfg.required_in("num_attention_heads", 1..=1 << 16)?;
        let kv_heads = cfg.optional_in("num_key_value_heads", 1..=heads)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads ({heads})");
            return Err(cfg.wrong("num_key_value_heads", expected, kv_heads.to_string()).into());
        }
        let head_dim = match (cfg.optional_in("head_dim", 1..=1 << 16)?, defaults.head_dim) {
            (Some(dim), _) | (None, Some(dim)) => dim,
            (None, None) if width % heads == 0 => width / heads,
            (None, None) => {
                let expected = format!("a multiple of num_attention_heads ({heads})");
                return Err(cfg.wrong("hidden_size", expected, width.to_string()).into());
            }
        };
        Ok(Self {
            vocab: cfg.required_in("vocab_size", 1..=1 << 28)?,
            width,
            layers: cfg.required_in("num_hidden_layers", 1..=MAX_LAYERS)?,
            heads,
            kv_heads,
            head_dim,
            max_positions: cfg
                .optional_in("max_position_embeddings", 1..=1 << 30)?
                .unwrap_or(defaults.max_positions),
            eps: cfg.optional_in("rms_norm_eps", 0.0..=1.0)?.unwrap_or(defaults.eps),
            tied: cfg.or("tie_word_embeddings", defaults.tied)?,
        })
    }

    /// What rotary frequencies assume where the config is silent.
    pub fn rope_defaults(&self) -> RopeDefaults {
        RopeDefaults {
            head_dim: self.head_dim,
            theta: 10_000.0,
            max_positions: self.max_positions,
            longrope_aliases: &[],
        }
    }

    /// A norm over whole rows.
    pub fn norm(&self) -> RmsNormSpec {
        RmsNormSpec::whole(self.width, self.eps)
    }
}

/// What a family's config class assumes where the file is silent.
#[derive(Debug, Clone, Copy)]
pub struct FamilyDefaults {
    /// Elements of a head; `None` where it follows from width and heads.
    pub head_dim: Option<usize>,
    /// Most positions.
    pub max_positions: usize,
    /// Added to mean squares.
    pub eps: f64,
    /// The head is the embedding.
    pub tied: bool,
}

/// Activation functions by the names that configs use.
pub const ACTIVATIONS: &[(&str, ActivationKind)] = &[
    ("silu", ActivationKind::Silu),
    ("swish", ActivationKind::Silu),
    ("gelu", ActivationKind::Gelu),
    ("gelu_pytorch_tanh", ActivationKind::GeluTanh),
    ("gelu_new", ActivationKind::GeluTanh),
    ("gelu_fast", ActivationKind::GeluTanh),
    ("quick_gelu", ActivationKind::QuickGelu),
    ("relu", ActivationKind::Relu),
    ("tanh", ActivationKind::Tanh),
];

/// A decoder under construction.
pub struct Frame<'a> {
    /// The graph and its weights.
    pub net: Net<'a>,
    /// `[rows]` I32.
    pub ids: ValueId,
    /// `[rows]` I32.
    pub positions: ValueId,
    rope: Option<Rope>,
    seq_starts: ValueId,
    past: ValueId,
    /// Of layers without a window, and of those with one.
    tables: [Option<ValueId>; 2],
    logit_rows: ValueId,
    caches: Vec<[ValueId; 2]>,
    windows: Vec<Option<usize>>,
}

/// How a layer attends.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSpec {
    /// Factor of scores.
    pub scale: f64,
    /// `cap * tanh(score / cap)` after scaling.
    pub softcap: Option<f64>,
}

/// Element type of the states of a cache, and extents of a head of a block, of keys and of values.
fn cache_form(dtype: DType, head_dim: usize) -> Result<(DType, [[usize; 2]; 2])> {
    if dtype != DType::Q8_0 {
        return Ok((dtype, [[head_dim, BLOCK_POSITIONS], [BLOCK_POSITIONS, head_dim]]));
    }
    if !head_dim.is_multiple_of(CACHE_GROUP) {
        let expected = "f32, f16 or bf16, as this model's heads are not made of blocks of 32";
        let found = format!("q8_0, and heads of {head_dim}");
        return Err(ModelError::Setting { setting: "cache_dtype", expected, found });
    }
    Ok((DType::U8, [[BLOCK_POSITIONS, head_dim / CACHE_GROUP * CACHE_GROUP_BYTES]; 2]))
}

impl<'a> Frame<'a> {
    /// Declares the inputs and states of a decoder. Keys further back than a layer's window are not seen.
    pub fn begin(
        cx: &BuildCx<'a>,
        name: &str,
        (sizes, windows): (&DecoderSizes, &[Option<usize>]),
        prefixes: &[&'static str],
        embedding: &str,
    ) -> Result<Self> {
        let net = Net::new(name, cx.weights, prefixes, embedding)?;
        let mut net = net.with_convention(cx.options.convention).in_namespace(&cx.options.namespace);
        let symbol = Dim::symbol;
        let mut input =
            |name: &str, dims: Vec<Dim>| net.graph.input(name, Shape::from_dims(dims, DType::I32));
        let ids = input("input_ids", vec![symbol("rows")])?;
        let positions = input("positions", vec![symbol("rows")])?;
        let seq_starts = input("seq_starts", vec![symbol("batch") + Dim::Known(1)])?;
        let past = input("past", vec![symbol("batch")])?;
        let mut table = |name: &str| input(name, vec![symbol("batch"), symbol("table")]);
        let windowed = windows.iter().flatten().count();
        let full_table = (windowed < sizes.layers).then(|| table("block_table")).transpose()?;
        let window_table = (windowed > 0).then(|| table("window_table")).transpose()?;
        let logit_rows = input("logit_rows", vec![symbol("outs")])?;
        let (dtype, [k_inner, v_inner]) = cache_form(cx.options.cache_dtype, sizes.head_dim)?;
        let mut caches = Vec::with_capacity(sizes.layers);
        for (layer, window) in windows.iter().enumerate() {
            let blocks = if window.is_some() { "window_blocks" } else { "blocks" };
            let mut state = |name: &str, inner: [usize; 2]| {
                let dims = vec![symbol(blocks), sizes.kv_heads.into(), inner[0].into(), inner[1].into()];
                net.graph.state(&format!("layers.{layer}.{name}"), Shape::from_dims(dims, dtype))
            };
            caches.push([state("k_cache", k_inner)?, state("v_cache", v_inner)?]);
        }
        let (tables, windows) = ([full_table, window_table], windows.to_vec());
        Ok(Self { net, ids, positions, rope: None, seq_starts, past, tables, logit_rows, caches, windows })
    }

    /// Cosines and sines of the rows' positions. Frequencies that depend on a sequence's length come in as the input
    /// `angles [rows, rotary_dim]` F32.
    pub fn angles(&mut self, rope: &Rope) -> Result<ValueId> {
        match rope.fixed() {
            Some(frequencies) => {
                let tensor = Tensor::from_slice(&[frequencies.len()], frequencies)?;
                let frequencies = self.net.graph.constant(tensor);
                let op = RopeAngles { scale: rope.scale };
                Ok(self.net.graph.add_one(op, &[self.positions, frequencies])?)
            }
            None => {
                self.rope = Some(rope.clone());
                let dims = vec![Dim::symbol("rows"), Dim::Known(rope.rotary_dim)];
                Ok(self.net.graph.input("angles", Shape::from_dims(dims, DType::F32))?)
            }
        }
    }

    /// Rotates `heads` heads of each row.
    pub fn rotate(
        &mut self,
        x: ValueId,
        angles: ValueId,
        heads: usize,
        sizes: &DecoderSizes,
    ) -> Result<ValueId> {
        let angle_dim = self.net.graph.shape(angles).last().and_then(Dim::known);
        let rotary_dim = angle_dim.unwrap_or(sizes.head_dim);
        let op = RopeOp { heads, head_dim: sizes.head_dim, rotary_dim, style: RopeStyle::Neox };
        Ok(self.net.graph.add_one(op, &[x, angles])?)
    }

    /// Causal attention of layer `layer` over its cache, after this run's keys and values are written to it.
    pub fn attend(
        &mut self,
        layer: usize,
        [q, k, v]: [ValueId; 3],
        sizes: &DecoderSizes,
        spec: AttentionSpec,
    ) -> Result<ValueId> {
        let op = Attention {
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            scale: spec.scale,
            causal: true,
            window: self.windows[layer],
            softcap: spec.softcap,
            mask: false,
            cache: true,
        };
        let [k_cache, v_cache] = self.caches[layer];
        let table = self.tables[usize::from(op.window.is_some())].into_iter();
        let operands = [q, k, v, self.seq_starts, self.past].into_iter().chain(table);
        let operands: Vec<ValueId> = operands.chain([k_cache, v_cache]).collect();
        Ok(self.net.graph.add_one(op, &operands)?)
    }

    /// The rows whose logits are wanted.
    pub fn wanted_rows(&mut self, x: ValueId) -> Result<ValueId> {
        Ok(self.net.graph.add_one(Gather { axis: 0 }, &[x, self.logit_rows])?)
    }

    /// Names the logits of normed rows as the output: through the embedding if it is tied, else through `lm_head`.
    pub fn finish(
        mut self,
        cx: &BuildCx<'_>,
        x: ValueId,
        sizes: &DecoderSizes,
        embedding: &str,
        softcap: Option<f64>,
    ) -> Result<Built> {
        let dims = [sizes.vocab, sizes.width];
        let head = match sizes.tied {
            true => self.net.weight(embedding, &dims)?,
            false => self.net.exact_weight("lm_head.weight", &dims)?,
        };
        let mut logits = self.net.graph.add_one(Linear::plain(), &[x, head])?;
        if let Some(cap) = softcap {
            logits = self.net.soft_cap(logits, cap)?;
        }
        self.net.graph.set_outputs(&[("logits", logits)])?;
        let stretched = self.rope.as_ref().and_then(Rope::stretched);
        let info = DecoderInfo {
            model_type: cx.model_type.clone(),
            vocab: sizes.vocab,
            layers: sizes.layers,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            max_positions: stretched.unwrap_or(sizes.max_positions),
            cache_dtype: cx.options.cache_dtype,
            full_layers: self.windows.iter().filter(|window| window.is_none()).count(),
            window: self.windows.iter().flatten().copied().max(),
            rope: self.rope,
        };
        let (graph, unused) = self.net.finish()?;
        Ok(Built::Decoder(Decoder { graph, info, unused }))
    }
}
