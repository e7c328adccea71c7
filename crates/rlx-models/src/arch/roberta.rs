//! RoBERTa (Liu et al., 2019): BERT whose positions start after the padding token's id.

use crate::arch::{BuildCx, Built, bert};
use crate::blocks::encoder::{self, EncoderNames, EncoderSpec};
use crate::error::Result;

pub fn build(cx: &BuildCx<'_>) -> Result<Built> {
    let pad = cx.cfg.optional_in("pad_token_id", 0..=1 << 16)?.unwrap_or(1);
    let names = EncoderNames { prefixes: &["roberta.", ""], ..bert::NAMES };
    let spec = EncoderSpec { first_position: pad + 1, names, ..bert::read(cx)? };
    encoder::build(cx, &spec)
}
