//! States that stay on a device between runs: only what is asked for comes back.

use super::driver::Driver;
use super::{Loaded, OpenDevice, words};
use rlx::backend::{BackendError, ResidentState, StateBuffer};
use rlx::plan::{BufferId, BufferKind};
use rlx_tensor::DType;
use std::fmt;
use std::sync::Arc;

/// Words that go up or come down in one piece.
const PIECE: usize = 1 << 22;

/// A state's words on a device.
pub(super) struct Resident<D: Driver> {
    device: Arc<OpenDevice<D>>,
    name: String,
    dtype: DType,
    words: usize,
    buffer: D::Buffer,
}

impl<D: Driver> fmt::Debug for Resident<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resident({} on {})", self.name, self.device.name)
    }
}

impl<D: Driver> ResidentState for Resident<D> {
    fn fetch(&self, bytes: &mut [u8]) -> Result<(), BackendError> {
        let size = self.dtype.element_bytes().unwrap_or(1);
        let what = format!("state {}", self.name);
        for (piece, bytes) in bytes.chunks_mut(PIECE * size).enumerate() {
            let count = bytes.len() / size;
            let words = self.device.driver.download(&what, &self.buffer, piece * PIECE, count)?;
            self.device.moved.count(0, count);
            words::narrowed(self.dtype, &words, bytes);
        }
        Ok(())
    }
}

impl<D: Driver> Resident<D> {
    pub fn words(&self) -> usize {
        self.words
    }

    pub fn buffer(&self) -> &D::Buffer {
        &self.buffer
    }

    fn upload(
        device: &Arc<OpenDevice<D>>,
        name: &str,
        dtype: DType,
        bytes: &[u8],
    ) -> Result<Self, BackendError> {
        let size = dtype.element_bytes().unwrap_or(1);
        let (words, what) = (bytes.len() / size, format!("state {name}"));
        let buffer = device.allocate(&what, words)?;
        for (piece, bytes) in bytes.chunks(PIECE * size).enumerate() {
            let words = words::widened(name, dtype, bytes)?;
            device.driver.upload(&what, &buffer, piece * PIECE, &words)?;
            device.moved.count(words.len(), 0);
        }
        Ok(Resident { device: Arc::clone(device), name: name.to_owned(), dtype, words, buffer })
    }
}

/// Brings every state that stays on the device there, unless it is there already.
pub(super) fn settle<'s, D: Driver>(
    loaded: &Loaded<D>,
    states: &'s mut [StateBuffer],
) -> Result<Vec<(BufferId, &'s Resident<D>)>, BackendError> {
    let template = &loaded.template;
    let mut settled = Vec::new();
    for (id, buffer) in template.buffer_ids() {
        let (BufferKind::State(at), true) = (&buffer.kind, loaded.plan.resident[id.index()]) else {
            continue;
        };
        let Some(dtype) = loaded.plan.dtypes[id.index()] else { continue };
        let state = &mut states[*at];
        let here = state.resident::<Resident<D>>();
        if here.is_none_or(|r| !Arc::ptr_eq(&r.device, &loaded.device) || r.dtype != dtype) {
            let name = &template.states()[*at].name;
            let moved = Resident::upload(&loaded.device, name, dtype, state.bytes()?)?;
            state.keep(moved);
        }
        settled.push((id, *at));
    }
    let states = &*states;
    let of = |(id, at): (BufferId, usize)| Some((id, states[at].resident::<Resident<D>>()?));
    Ok(settled.into_iter().filter_map(of).collect())
}
