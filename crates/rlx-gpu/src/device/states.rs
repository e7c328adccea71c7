//! States that stay on a device between runs: only what is asked for comes back.

use super::driver::Driver;
use super::{Loaded, OpenDevice, words};
use crate::lower::cache;
use rlx::backend::{BackendError, ResidentState, StateBuffer};
use rlx::plan::{BufferId, BufferKind};
use rlx_tensor::DType;
use rlx_tensor::quant::Q8Head;
use std::fmt;
use std::sync::Arc;

/// Words that go up or come down in one piece.
const PIECE: usize = 1 << 22;

/// How a state's bytes become words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Elements(DType),
    Heads(Q8Head),
}

impl Form {
    /// The fewest bytes that become words of their own, and how many.
    fn unit(self) -> (usize, usize) {
        match self {
            Form::Elements(dtype) => (dtype.element_bytes().unwrap_or(1), 1),
            Form::Heads(head) => (head.bytes(), head.positions * cache::head_words(head.dim)),
        }
    }

    /// Bytes of a piece, and its words.
    fn piece(self) -> (usize, usize) {
        let (bytes, words) = self.unit();
        let count = (PIECE / words).max(1);
        (count * bytes, count * words)
    }
}

/// A state's words on a device.
pub(super) struct Resident<D: Driver> {
    device: Arc<OpenDevice<D>>,
    name: String,
    form: Form,
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
        let ((size, per), (piece, step)) = (self.form.unit(), self.form.piece());
        let what = format!("state {}", self.name);
        for (at, bytes) in bytes.chunks_mut(piece).enumerate() {
            let count = bytes.len() / size * per;
            let words = self.device.driver.download(&what, &self.buffer, at * step, count)?;
            self.device.moved.count(0, count);
            match self.form {
                Form::Elements(dtype) => words::narrowed(dtype, &words, bytes),
                Form::Heads(head) => cache::fetch(head, &words, bytes),
            }
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
        form: Form,
        bytes: &[u8],
    ) -> Result<Self, BackendError> {
        let ((size, per), (piece, step)) = (form.unit(), form.piece());
        let (words, what) = (bytes.len() / size * per, format!("state {name}"));
        let buffer = device.allocate(&what, words)?;
        for (at, bytes) in bytes.chunks(piece).enumerate() {
            let words = match form {
                Form::Elements(dtype) => words::widened(name, dtype, bytes)?,
                Form::Heads(head) => cache::upload(head, bytes),
            };
            device.driver.upload(&what, &buffer, at * step, &words)?;
            device.moved.count(words.len(), 0);
        }
        Ok(Resident { device: Arc::clone(device), name: name.to_owned(), form, words, buffer })
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
        let form = loaded.plan.caches[id.index()].map_or(Form::Elements(dtype), Form::Heads);
        let state = &mut states[*at];
        let here = state.resident::<Resident<D>>();
        if here.is_none_or(|r| !Arc::ptr_eq(&r.device, &loaded.device) || r.form != form) {
            let name = &template.states()[*at].name;
            let moved = Resident::upload(&loaded.device, name, form, state.bytes()?)?;
            state.keep(moved);
        }
        settled.push((id, *at));
    }
    let states = &*states;
    let of = |(id, at): (BufferId, usize)| Some((id, states[at].resident::<Resident<D>>()?));
    Ok(settled.into_iter().filter_map(of).collect())
}
