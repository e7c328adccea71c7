//! What a plan asks of whoever binds its buffers: names, sizes, alignment, offsets.

use super::lir::Lir;
use super::memory::ALIGNMENT;
use super::template::InterfaceEntry;
use rlx_tensor::DType;

/// One input, param, state or output at capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEntry {
    /// Its name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Extents at capacity, outermost first.
    pub shape: Vec<usize>,
    /// Bytes at capacity.
    pub bytes: usize,
    /// What its address must be a multiple of, in bytes.
    pub alignment: usize,
    /// Where it stands in the arena; `None` if the caller or the registry owns it.
    pub arena_offset: Option<usize>,
}

/// The layout that an executable uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindingManifest {
    /// Inputs in declaration order.
    pub inputs: Vec<ManifestEntry>,
    /// Params in declaration order.
    pub params: Vec<ManifestEntry>,
    /// States in declaration order.
    pub states: Vec<ManifestEntry>,
    /// Outputs in order.
    pub outputs: Vec<ManifestEntry>,
    /// Size of the arena in bytes.
    pub arena_bytes: usize,
}

impl BindingManifest {
    /// The manifest of a specialised template.
    pub fn from_lir(lir: &Lir) -> Self {
        let entries = |list: &[InterfaceEntry]| list.iter().map(|e| entry(lir, e)).collect();
        let template = lir.template();
        Self {
            inputs: entries(template.inputs()),
            params: entries(template.params()),
            states: entries(template.states()),
            outputs: entries(template.outputs()),
            arena_bytes: lir.arena_bytes(),
        }
    }
}

fn entry(lir: &Lir, entry: &InterfaceEntry) -> ManifestEntry {
    let place = &entry.place;
    let arena_offset = lir.offset(place.buffer);
    let element = place.dtype.element_bytes().unwrap_or(1);
    ManifestEntry {
        name: entry.name.clone(),
        dtype: place.dtype,
        shape: place.dims.iter().map(|d| lir.capacities()[d.index()]).collect(),
        bytes: lir.buffer_bytes(place.buffer),
        alignment: if arena_offset.is_some() { ALIGNMENT } else { element },
        arena_offset,
    }
}
