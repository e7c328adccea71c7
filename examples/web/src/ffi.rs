//! What the page calls, and what it is called for. Arguments are written into memory that [`text`] and [`bytes`] give; answers are
//! JSON, handed to `answer`.
#![expect(unsafe_code, reason = "functions of a module are reached by name, and memory by address")]

use crate::{Loaded, Place, Request};
use rlx::backend::BackendError;
use rlx_kernels::isa::Isa;
use rlx_models::ModelError;
use rlx_tensor::storage::AlignedBytes;
use rlx_tensor::time;
use serde::Serialize;
use std::cell::RefCell;
use std::time::Duration;

#[link(wasm_import_module = "page")]
unsafe extern "C" {
    /// Milliseconds since some point.
    safe fn now_ms() -> f64;
    /// Fills memory with random bytes.
    fn random(at: *mut u8, len: usize);
    /// Takes JSON: what a call gives, or `{"error": ..}`.
    fn answer(at: *const u8, len: usize);
    /// Takes a piece of text; 0 ends it.
    fn piece(at: *const u8, len: usize) -> u32;
    /// Takes the message of a panic, after which the module must not be used.
    fn panicked(at: *const u8, len: usize);
}

#[derive(Default)]
struct State {
    text: Vec<u8>,
    bytes: Option<AlignedBytes>,
    files: Vec<(String, AlignedBytes)>,
    models: Vec<Option<Loaded>>,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

#[derive(Serialize)]
struct Failure {
    error: String,
    /// Whether another device may do better.
    device: bool,
}

impl Failure {
    fn of_caller(error: impl Into<String>) -> Self {
        Failure { error: error.into(), device: false }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        Failure { error: error.to_string(), device: error.is_device_fault() }
    }
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        Failure { error: error.to_string(), device: error.is_device_fault() }
    }
}

fn told(json: &impl Serialize) {
    let text = serde_json::to_string(json).unwrap_or_default();
    // SAFETY: the page reads the text before it returns.
    unsafe { answer(text.as_ptr(), text.len()) }
}

/// Hands over the answer, or the error with its causes; true if it is an answer.
fn answered<T: Serialize>(result: Result<T, Failure>) -> bool {
    match &result {
        Ok(value) => told(value),
        Err(failure) => told(failure),
    }
    result.is_ok()
}

fn taken_text() -> String {
    let bytes = STATE.with_borrow_mut(|state| std::mem::take(&mut state.text));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts a model, or none, in a slot; what was there comes back.
fn replaced(slot: usize, model: Option<Loaded>) -> Option<Loaded> {
    STATE.with_borrow_mut(|state| {
        if state.models.len() <= slot {
            state.models.resize_with(slot + 1, || None);
        }
        std::mem::replace(&mut state.models[slot], model)
    })
}

fn with_model<T>(slot: usize, call: impl FnOnce(&Loaded) -> Result<T, ModelError>) -> Result<T, Failure> {
    // Taken out, so that a call that waits for the device holds no borrow.
    let Some(model) = replaced(slot, None) else { return Err(Failure::of_caller("no model is open here")) };
    let result = call(&model);
    replaced(slot, Some(model));
    Ok(result?)
}

/// Gives the clock and the way to tell panics. To be called once, first.
#[unsafe(no_mangle)]
extern "C" fn start() {
    time::set_clock(|| Duration::from_secs_f64(now_ms().max(0.0) / 1e3));
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string();
        // SAFETY: the page reads the text before it returns.
        unsafe { panicked(text.as_ptr(), text.len()) }
    }));
}

/// Memory for the text argument of the next call.
#[unsafe(no_mangle)]
extern "C" fn text(len: usize) -> *mut u8 {
    STATE.with_borrow_mut(|state| {
        state.text = vec![0; len];
        state.text.as_mut_ptr()
    })
}

/// Memory for the content of a file; null if there is none left.
#[unsafe(no_mangle)]
extern "C" fn bytes(len: usize) -> *mut u8 {
    STATE.with_borrow_mut(|state| {
        state.bytes = AlignedBytes::try_zeroed(len);
        state.bytes.as_mut().map_or(std::ptr::null_mut(), |bytes| bytes.as_mut_slice().as_mut_ptr())
    })
}

/// Keeps the content written as the file of the name written, for the next [`open`].
#[unsafe(no_mangle)]
extern "C" fn add_file() {
    let name = taken_text();
    STATE.with_borrow_mut(|state| {
        if let Some(bytes) = state.bytes.take() {
            state.files.push((name, bytes));
        }
    });
}

/// Opens the files added under the name written, or the demo model if there are none, in place of the slot's model. On the device if `device` is not
/// 0, else on the processor: by plain code only if `scalar` is not 0. Answers a [`crate::Description`].
#[unsafe(no_mangle)]
extern "C" fn open(slot: usize, device: u32, scalar: u32) -> bool {
    let name = taken_text();
    drop(replaced(slot, None));
    let files = STATE.with_borrow_mut(|state| std::mem::take(&mut state.files));
    let place = match device {
        0 => Ok(Place::Cpu((scalar != 0).then_some(Isa::Scalar))),
        _ => rlx_gpu::browser::backend().map(Place::Device).map_err(Failure::from),
    };
    let opened = place.and_then(|place| {
        let opened = if files.is_empty() { Loaded::demo(&place) } else { Loaded::open(&name, files, &place) };
        Ok(opened?)
    });
    answered(opened.map(|model| {
        let description = model.describe();
        replaced(slot, Some(model));
        description
    }))
}

/// Answers the vector of the text written.
#[unsafe(no_mangle)]
extern "C" fn embed(slot: usize) -> bool {
    let text = taken_text();
    answered(with_model(slot, |model| model.embed(&text)))
}

/// Continues a text as the [`Request`] written says; pieces go to the page as they come. Answers a [`crate::Report`].
#[unsafe(no_mangle)]
extern "C" fn generate(slot: usize) -> bool {
    let request = serde_json::from_str(&taken_text());
    let request = request.map_err(|error| Failure::of_caller(error.to_string()));
    answered(request.and_then(|request: Request| {
        with_model(slot, |model| {
            // SAFETY: the page reads the piece before it returns.
            let give = |text: &str| unsafe { piece(text.as_ptr(), text.len()) } != 0;
            model.generate(&request, give)
        })
    }))
}

/// Frees the slot's model.
#[unsafe(no_mangle)]
extern "C" fn close(slot: usize) {
    drop(replaced(slot, None));
}

/// Random bytes for the crates that ask the system for some.
///
/// # Safety
/// `at` is valid for writes of `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "Rust" fn __getrandom_v03_custom(at: *mut u8, len: usize) -> Result<(), getrandom::Error> {
    // SAFETY: the caller guarantees the memory; the page writes `len` bytes.
    unsafe { random(at, len) };
    Ok(())
}
