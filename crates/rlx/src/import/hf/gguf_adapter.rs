//! A low-rank adapter in a GGUF file, brought to the names and the order of rows of a Hugging Face checkpoint.

use super::peft::{PREFIX, PeftAdapter, pair_factors};
use crate::import::ImportError;
use crate::import::gguf::GgufLoader;
use crate::weights::{BytesWeightLoader, WeightLoader};
use rlx_tensor::DType;
use std::path::Path;

type Names = &'static [(&'static str, &'static str)];

const LLAMA: Names = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const PHI3: Names = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const GPT2: Names = &[
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];

/// The weight that a tensor's stem names.
fn base_name(architecture: &str, stem: &str) -> Option<String> {
    if stem == "output.weight" {
        return Some("lm_head".to_owned());
    }
    let (layer, rest) = stem.strip_prefix("blk.")?.split_once('.')?;
    layer.parse::<u32>().ok()?;
    let module = rest.strip_suffix(".weight")?;
    let (names, stack) = match architecture {
        "gpt2" => (GPT2, "transformer.h"),
        "phi3" => (PHI3, "model.layers"),
        _ => (LLAMA, "model.layers"),
    };
    let (_, name) = names.iter().find(|(gguf, _)| *gguf == module)?;
    Some(format!("{stack}.{layer}.{name}"))
}

/// Rows of queries and keys as Hugging Face has them: a llama file has the two halves of each head interleaved.
fn halves_apart(bytes: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = bytes.len().checked_div(rows).unwrap_or(0);
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, at) = (within / (head_dim / 2), within % (head_dim / 2));
        let from = head * head_dim + 2 * at + half;
        out.extend_from_slice(&bytes[from * row_bytes..(from + 1) * row_bytes]);
    }
    out
}

impl PeftAdapter {
    /// Opens a GGUF file with an adapter for a model whose heads have `head_dim` elements.
    ///
    /// # Errors
    /// [`ImportError`] for a file that is broken or holds no plain LoRA, a tensor that is no factor or whose base has no name here, a
    /// factor without its other side, ranks that differ.
    pub fn open_gguf(path: impl AsRef<Path>, head_dim: usize) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let file = GgufLoader::open(path)?;
        let metadata = file.metadata();
        for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
            let found = metadata.string(key)?;
            if found != Some(expected) {
                return Err(wrong(path, key, expected, found.unwrap_or("nothing")));
            }
        }
        let alpha = metadata.f64("adapter.lora.alpha")?;
        let alpha = alpha.ok_or_else(|| wrong(path, "adapter.lora.alpha", "a number", "nothing"))? as f32;
        let architecture = metadata.string("general.architecture")?.unwrap_or_default();
        let (mut rank, mut tensors) = (None, Vec::new());
        for name in file.names() {
            let sides = [(".lora_a", "A", 0), (".lora_b", "B", 1)];
            let side =
                sides.iter().find_map(|(end, side, axis)| Some((name.strip_suffix(end)?, side, *axis)));
            let (stem, side, axis) = side
                .ok_or_else(|| wrong(path, name, "a name that ends in .lora_a or .lora_b", "this tensor"))?;
            let base = base_name(architecture, stem)
                .ok_or_else(|| wrong(path, name, "a linear layer of a supported family", "this tensor"))?;
            let Some(view) = file.tensor(name)? else { continue };
            let &[rows, _] = view.dims else {
                return Err(wrong(path, name, "a matrix", &format!("{:?}", view.dims)));
            };
            if !matches!(view.dtype, DType::F32 | DType::F16 | DType::BF16) {
                return Err(wrong(path, name, "f32, f16 or bf16", &view.dtype.to_string()));
            }
            let found = view.dims[axis];
            if *rank.get_or_insert(found) != found {
                return Err(wrong(path, name, "one rank for all factors", &found.to_string()));
            }
            let turned = base.ends_with("self_attn.q_proj") || base.ends_with("self_attn.k_proj");
            let bytes = match architecture == "llama" && turned && axis == 1 {
                true if head_dim < 2 || !head_dim.is_multiple_of(2) || rows % head_dim != 0 => {
                    let expected = format!("rows of whole heads of {head_dim}");
                    return Err(wrong(path, name, &expected, &rows.to_string()));
                }
                true => halves_apart(view.bytes, rows, head_dim),
                false => view.bytes.to_vec(),
            };
            tensors.push((
                format!("{PREFIX}{base}.lora_{side}.weight"),
                view.dims.to_vec(),
                view.dtype,
                bytes,
            ));
        }
        let rank = rank.ok_or_else(|| wrong(path, "tensors", "factors of an adapter", "none"))?;
        let loader = BytesWeightLoader::from_typed(tensors)?;
        let factors = pair_factors(path, &loader)?;
        Ok(PeftAdapter { rank, alpha, own: Default::default(), loader: Box::new(loader), factors })
    }
}

fn wrong(path: &Path, field: &str, expected: &str, found: &str) -> ImportError {
    ImportError::Field {
        path: path.to_path_buf(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::gguf::{Metadata, TensorEntry, Value, encode_header};

    fn file(folder: &Path, fields: &[(&str, Value)], tensors: &[(&str, [usize; 2])]) -> std::path::PathBuf {
        let path = folder.join("adapter.gguf");
        let mut metadata = Metadata::new(&path);
        fields.iter().for_each(|(key, value)| assert!(metadata.insert(key, value.clone())));
        let entries: Vec<TensorEntry> = tensors
            .iter()
            .map(|(name, dims)| TensorEntry {
                name: (*name).to_owned(),
                dims: dims.to_vec(),
                dtype: DType::F32,
            })
            .collect();
        let mut bytes = encode_header(&metadata, &entries, 32).unwrap();
        for (_, [rows, columns]) in tensors {
            (0..rows * columns).for_each(|i| bytes.extend((i as f32).to_le_bytes()));
            bytes.resize(bytes.len().next_multiple_of(32), 0);
        }
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn lora(architecture: &str) -> Vec<(&'static str, Value)> {
        let text = |text: &str| Value::String(text.to_owned());
        vec![
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("general.architecture", text(architecture)),
            ("adapter.lora.alpha", Value::F32(8.0)),
        ]
    }

    const A: (&str, [usize; 2]) = ("blk.3.attn_q.weight.lora_a", [2, 6]);
    const B: (&str, [usize; 2]) = ("blk.3.attn_q.weight.lora_b", [8, 2]);

    #[test]
    fn names_and_rows_are_those_of_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let adapter = PeftAdapter::open_gguf(file(folder.path(), &lora("llama"), &[A, B]), 4).unwrap();
        assert_eq!((adapter.rank(), adapter.alpha()), (2, 8.0));
        let base = "model.layers.3.self_attn.q_proj.weight";
        assert_eq!(adapter.base_names().collect::<Vec<_>>(), [base]);
        let b =
            adapter.loader.tensor("base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight").unwrap();
        let first: Vec<f32> = b
            .unwrap()
            .bytes
            .chunks(8)
            .map(|row| f32::from_le_bytes([row[0], row[1], row[2], row[3]]) / 2.0)
            .collect();
        assert_eq!(first, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        let plain = PeftAdapter::open_gguf(file(folder.path(), &lora("qwen2"), &[A, B]), 4).unwrap();
        assert_eq!(plain.base_names().collect::<Vec<_>>(), [base]);
    }

    #[test]
    fn what_is_no_plain_adapter_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |fields: &[(&str, Value)], tensors: &[(&str, [usize; 2])], word: &str| {
            let error =
                PeftAdapter::open_gguf(file(folder.path(), fields, tensors), 4).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        };
        refused(&lora("llama")[1..], &[A, B], "general.type");
        refused(&lora("llama")[..3], &[A, B], "adapter.lora.alpha");
        refused(&lora("llama"), &[A], "lora_B");
        refused(&lora("llama"), &[], "factors");
        refused(&lora("llama"), &[A, (B.0, [6, 2])], "whole heads");
        refused(&lora("llama"), &[A, (B.0, [8, 3])], "one rank");
        refused(&lora("llama"), &[A, B, ("blk.3.attn_norm.weight", [1, 6])], "attn_norm");
        refused(&lora("llama"), &[("blk.3.odd.weight.lora_a", [2, 6])], "odd");
    }
}
