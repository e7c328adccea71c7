//! From rows to one vector a sequence, as sentence-transformers' files say.

use crate::arch::BuildCx;
use crate::blocks::net::Net;
use crate::error::Result;
use rlx::import::hf::PoolingMode;
use rlx_graph::ValueId;
use rlx_graph::ops::concat::Concat;
use rlx_graph::ops::l2_normalize::L2Normalize;
use rlx_graph::ops::pool::{Pool, PoolKind};

/// What torch divides by at least, in `normalize`.
const SMALLEST_LENGTH: f64 = 1e-12;

/// Adds pooling and normalisation; returns the embedding and its size. Without sentence-transformers' files it is the mean.
pub fn add(
    net: &mut Net<'_>,
    cx: &BuildCx<'_>,
    rows: ValueId,
    seq_starts: ValueId,
    width: usize,
) -> Result<(ValueId, usize)> {
    let (modes, normalize) = match cx.sentence {
        Some(sentence) => (sentence.pooling.modes.as_slice(), sentence.normalize),
        None => (&[PoolingMode::Mean][..], false),
    };
    let mut pooled = Vec::with_capacity(modes.len());
    for mode in modes {
        let kind = match mode {
            PoolingMode::Mean => PoolKind::Mean,
            PoolingMode::Cls => PoolKind::Cls,
            PoolingMode::Max => PoolKind::Max,
            PoolingMode::LastToken => PoolKind::Last,
            other => {
                let supported = "cls, max, mean or lasttoken (no other mode is supported)";
                return Err(cx.cfg.wrong("pooling_mode", supported, format!("{other:?}")).into());
            }
        };
        pooled.push(net.graph.add_one(Pool { kind }, &[rows, seq_starts])?);
    }
    let mut embedding = match pooled.as_slice() {
        [only] => *only,
        several => net.graph.add_one(Concat { axis: 1 }, several)?,
    };
    if normalize {
        embedding = net.graph.add_one(L2Normalize { eps: SMALLEST_LENGTH }, &[embedding])?;
    }
    Ok((embedding, width * modes.len()))
}
