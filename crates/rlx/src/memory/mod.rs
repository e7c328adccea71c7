//! How much memory there is, how much may be used, and how much a model will use.

mod budget;
mod estimate;
pub mod experts;
mod probe;

pub use budget::{
    BudgetVerdict, DEFAULT_SOFT_MEMORY_FRACTION, MemoryRefusal, MemoryView, available_unified_memory,
    llama_decode_bucket_compile_peak_bytes, llama_decode_oneshot_compile_peak_bytes, memory_headroom_bytes,
    process_rss_bytes, soft_memory_budget_bytes, soft_memory_fraction, would_exceed_soft_budget,
};
pub use estimate::{MemoryDeficit, MemoryEstimate, MemoryPart, estimate_together, estimate_with};
pub use probe::{
    CgroupMemory, Commands, FixedProbe, MacProbe, MemoryProbe, ProcProbe, ResidentBytes, Shell, SystemProbe,
    WindowsProbe,
};
