//! Names of tensors: those of GGUF files, and those that checkpoints of the Hugging Face hub use, which the architectures ask for.

/// Where a tensor of a GGUF file goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// It is one tensor.
    One(String),
    /// It holds one for each expert: what stands before and after the expert's number.
    Experts(String, String),
    /// It is read with the config.
    Config,
    /// The architecture has none of this name.
    Unknown,
}

/// (part of a block in GGUF, the same below a layer).
type Pairs = &'static [(&'static str, &'static str)];

const LLAMA: Pairs = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_inp", "mlp.gate"),
];

/// What differs from [`LLAMA`].
const MIXTRAL: Pairs = &[("ffn_gate_inp", "block_sparse_moe.gate")];
const GEMMA: Pairs = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
const PHI3: Pairs = &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];
const GPT2: Pairs = &[
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];
const BERT: Pairs = &[
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];

const NOMIC_BERT: Pairs = &[
    ("attn_qkv", "attn.Wqkv"),
    ("attn_output", "attn.out_proj"),
    ("attn_output_norm", "norm1"),
    ("ffn_up", "mlp.fc11"),
    ("ffn_gate", "mlp.fc12"),
    ("ffn_down", "mlp.fc2"),
    ("layer_output_norm", "norm2"),
];

const DECODER_ROOT: Pairs =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const GPT2_ROOT: Pairs =
    &[("token_embd", "wte"), ("position_embd", "wpe"), ("output_norm", "ln_f"), ("output", "lm_head")];
const BERT_ROOT: Pairs = &[
    ("token_embd", "embeddings.word_embeddings"),
    ("token_types", "embeddings.token_type_embeddings"),
    ("position_embd", "embeddings.position_embeddings"),
    ("token_embd_norm", "embeddings.LayerNorm"),
];

const NOMIC_BERT_ROOT: Pairs = &[
    ("token_embd", "embeddings.word_embeddings"),
    ("token_types", "embeddings.token_type_embeddings"),
    ("token_embd_norm", "emb_ln"),
];

const CONFIG_TENSORS: &[&str] =
    &["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

struct Family {
    root: Pairs,
    layer: &'static str,
    own: Pairs,
    shared: Pairs,
    /// Parent of the experts, and names of gate, up and down within one.
    experts: Option<(&'static str, [&'static str; 3])>,
}

fn family_of(model_type: &str) -> Family {
    let decoder =
        Family { root: DECODER_ROOT, layer: "model.layers", own: &[], shared: LLAMA, experts: None };
    let qwen = Some(("mlp.experts", ["gate_proj", "up_proj", "down_proj"]));
    match model_type {
        "mixtral" => Family {
            own: MIXTRAL,
            experts: Some(("block_sparse_moe.experts", ["w1", "w3", "w2"])),
            ..decoder
        },
        "qwen2_moe" | "qwen3_moe" => Family { experts: qwen, ..decoder },
        "gemma2" | "gemma3_text" => Family { own: GEMMA, ..decoder },
        "phi3" => Family { own: PHI3, ..decoder },
        "gpt2" => Family { root: GPT2_ROOT, layer: "h", own: &[], shared: GPT2, experts: None },
        "bert" => Family { root: BERT_ROOT, layer: "encoder.layer", own: &[], shared: BERT, experts: None },
        "nomic_bert" => Family {
            root: NOMIC_BERT_ROOT,
            layer: "encoder.layers",
            own: &[],
            shared: NOMIC_BERT,
            experts: None,
        },
        _ => decoder,
    }
}

const EXPERTS: [&str; 3] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];

impl Family {
    /// (GGUF's, the hub's) names of a layer's parts; the family's own come first.
    fn parts(&self) -> impl Iterator<Item = &(&'static str, &'static str)> {
        let taken = |name: &str| self.own.iter().any(|(gguf, hub)| *gguf == name || *hub == name);
        self.own.iter().chain(self.shared.iter().filter(move |(gguf, hub)| !taken(gguf) && !taken(hub)))
    }
}

/// Where the tensor `name` of a GGUF file goes in a model of this `model_type`.
pub fn hub_place(model_type: &str, name: &str) -> Place {
    if CONFIG_TENSORS.contains(&name) {
        return Place::Config;
    }
    let family = family_of(model_type);
    let Some((stem, ending)) = name.rsplit_once('.') else { return Place::Unknown };
    if let Some((_, hub)) = family.root.iter().find(|(gguf, _)| *gguf == stem) {
        return Place::One(format!("{hub}.{ending}"));
    }
    let block = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((layer, part)) = block.and_then(|(layer, part)| Some((layer.parse::<usize>().ok()?, part)))
    else {
        return Place::Unknown;
    };
    let at = format!("{}.{layer}", family.layer);
    if let Some((_, hub)) = family.parts().find(|(gguf, _)| *gguf == part) {
        return Place::One(format!("{at}.{hub}.{ending}"));
    }
    let expert = EXPERTS.iter().position(|expert| *expert == part);
    match (expert, family.experts) {
        (Some(which), Some((parent, names))) => {
            Place::Experts(format!("{at}.{parent}."), format!(".{}.{ending}", names[which]))
        }
        _ => Place::Unknown,
    }
}

/// The GGUF name of the hub's tensor `name`, and for a tensor of an expert its number; `None` for a tensor that files have no
/// place for. `name` starts as the architecture's own checkpoints do.
pub fn gguf_name(model_type: &str, name: &str) -> Option<(String, Option<usize>)> {
    let family = family_of(model_type);
    let (stem, ending) = name.rsplit_once('.')?;
    if let Some((gguf, _)) = family.root.iter().find(|(_, hub)| *hub == stem) {
        return Some((format!("{gguf}.{ending}"), None));
    }
    let (layer, part) = stem.strip_prefix(family.layer)?.strip_prefix('.')?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    if let Some((gguf, _)) = family.parts().find(|(_, hub)| *hub == part) {
        return Some((format!("blk.{layer}.{gguf}.{ending}"), None));
    }
    let (parent, names) = family.experts?;
    let (expert, leaf) = part.strip_prefix(parent)?.strip_prefix('.')?.split_once('.')?;
    let which = names.iter().position(|name| *name == leaf)?;
    Some((format!("blk.{layer}.{}.{ending}", EXPERTS[which]), Some(expert.parse().ok()?)))
}
