use super::generic::{AttentionF32, MergeF32};
use super::{AppendArgs, AttentionArgs, append::AppendF32};
use crate::isa::{Entry, Isa, Row, Rows, select};

/// Instances of attention.
pub static ATTENTION: Rows<AttentionArgs> = Row::all_of::<AttentionF32>();
/// Instances of the merge of chunks: tile `r` is query row `r`.
pub static MERGE: Rows<AttentionArgs> = Row::all_of::<MergeF32>();
/// Instances of the cache append: tile `r` is row `r`.
pub static APPEND: Rows<AppendArgs> = Row::all_of::<AppendF32>();

/// Attention for `isa`.
pub fn attention_entry(isa: Isa) -> Option<Entry<AttentionArgs>> {
    select(&ATTENTION, isa)
}

/// The merge of chunks for `isa`.
pub fn merge_entry(isa: Isa) -> Option<Entry<AttentionArgs>> {
    select(&MERGE, isa)
}

/// The cache append for `isa`.
pub fn append_entry(isa: Isa) -> Option<Entry<AppendArgs>> {
    select(&APPEND, isa)
}
