//! A model on the first device of a chain that runs it, and on the next one where that one fails, also in the middle of a text.

use crate::error::{ModelError, Result};
use crate::model::{Draft, HeldText, Model, TextOptions};
use crate::text::TextGeneration;
use rlx::SessionError;
use rlx::devices::{DeviceAttempt, DeviceError, DeviceFallbackError, DeviceId};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// What a device that failed changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fallback {
    /// The model went to the next device of the chain.
    Moved {
        /// The device that failed.
        from: DeviceId,
        /// The device that is tried next.
        to: DeviceId,
        /// What went wrong.
        cause: String,
    },
    /// The device of the draft model failed: texts go on without its guesses, which never change them.
    Undrafted {
        /// What went wrong.
        cause: String,
    },
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fallback::Moved { from, to, cause } => {
                write!(f, "on {to}, for {from} cannot run the model: {cause}")
            }
            Fallback::Undrafted { cause } => write!(f, "without guesses of the draft model: {cause}"),
        }
    }
}

type Open = dyn Fn(DeviceId) -> Result<Model> + Send + Sync;
type Tell = dyn Fn(&Fallback) + Send + Sync;

/// One model on a chain of devices, in the manner of [`rlx::devices::GraphDevices::run_try`]: a fault of a device (lost, out of memory, an op
/// that it does not run, a panic of its backend) goes on with the next device, a fault of the caller returns at once. A chain of one device
/// is that device, and its faults are errors.
///
/// A model that was left is kept until this is dropped: texts read its tokenizer.
pub struct ModelDevices {
    chain: Vec<DeviceId>,
    /// The model on the first device that opened it.
    first: Arc<Model>,
    /// The model on each device that it went to later.
    later: Vec<OnceLock<Arc<Model>>>,
    at: AtomicUsize,
    open: Box<Open>,
    tell: Box<Tell>,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    attempts: Vec<DeviceAttempt>,
    fallbacks: Vec<Fallback>,
}

impl fmt::Debug for ModelDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain: Vec<String> = self.chain.iter().map(DeviceId::to_string).collect();
        write!(f, "ModelDevices({}, on {})", chain.join(", "), self.device())
    }
}

impl ModelDevices {
    /// Opens a model on the first of these devices that can: `open` opens it on one. `tell` hears of each fallback before the work goes on.
    ///
    /// # Errors
    /// [`DeviceError::EmptyChain`]; of `open`; [`SessionError::Fallback`] with every attempt where there were several.
    pub fn open(
        chain: &[DeviceId],
        open: impl Fn(DeviceId) -> Result<Model> + Send + Sync + 'static,
        tell: impl Fn(&Fallback) + Send + Sync + 'static,
    ) -> Result<Self> {
        let Some(&device) = chain.first() else {
            return Err(SessionError::from(DeviceError::EmptyChain).into());
        };
        let (mut log, open, tell): (_, Box<Open>, Box<Tell>) =
            (Log::default(), Box::new(open), Box::new(tell));
        let (at, first) = match open(device) {
            Ok(model) => (0, model),
            Err(error) => log.next(chain, 0, error, (&*open, &*tell))?,
        };
        let later = chain.iter().map(|_| OnceLock::new()).collect();
        let (at, chain, first, log) =
            (AtomicUsize::new(at), chain.to_vec(), Arc::new(first), Mutex::new(log));
        Ok(Self { chain, first, later, at, open, tell, log })
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self) -> usize {
        self.at.load(Ordering::Acquire)
    }

    /// The model on the device that it is on now.
    pub fn model(&self) -> &Arc<Model> {
        self.model_at(self.at())
    }

    fn model_at(&self, at: usize) -> &Arc<Model> {
        self.later[at].get().unwrap_or(&self.first)
    }

    /// The device that the model is on now.
    pub fn device(&self) -> DeviceId {
        self.chain[self.at()]
    }

    /// What has happened so far, in order.
    pub fn fallbacks(&self) -> Vec<Fallback> {
        self.log().fallbacks.clone()
    }

    /// Takes the model to the next device that opens it, where the fault is that of the device at `at`.
    fn after(&self, at: usize, error: ModelError) -> Result<()> {
        if !error.is_device_fault() {
            return Err(error);
        }
        let mut log = self.log();
        // Another thread may have come upon it before.
        if self.at() == at {
            let left = self.model_at(at);
            let (next, model) = log.next(&self.chain, at, error, (&*self.open, &*self.tell))?;
            model.adopt_adapters(left)?;
            let _ = self.later[next].set(Arc::new(model));
            self.at.store(next, Ordering::Release);
        }
        Ok(())
    }

    /// Does work on the model, and does it again, from its beginning, on the next device where one fails. What it gives is of one device.
    ///
    /// # Errors
    /// Of the work; [`SessionError::Fallback`] with every attempt where no device of several did it.
    pub fn run<'d, T>(&'d self, mut work: impl FnMut(&'d Model) -> Result<T>) -> Result<T> {
        loop {
            let at = self.at();
            match work(self.model_at(at)) {
                Err(error) => self.after(at, error)?,
                done => return done,
            }
        }
    }

    /// As [`Model::embed`]: all texts by one device.
    ///
    /// # Errors
    /// As [`Model::embed`] and [`ModelDevices::run`].
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        self.run(|model| model.embed(texts))
    }

    /// As [`Model::generate_tokens`]; pieces come by [`ModelDevices::next_piece`].
    ///
    /// # Errors
    /// As [`Model::generate_tokens`] and [`ModelDevices::run`].
    pub fn generate_tokens(&self, prompt: &[u32], options: &TextOptions) -> Result<TextGeneration<'_>> {
        self.start(options, |model, options| model.generate_tokens(prompt, options))
    }

    /// As [`Model::generate_after`]; pieces come by [`ModelDevices::next_piece`].
    ///
    /// # Errors
    /// As [`Model::generate_after`] and [`ModelDevices::run`].
    pub fn generate_after(
        &self,
        mut held: Option<HeldText>,
        prompt: &[u32],
        options: &TextOptions,
    ) -> Result<TextGeneration<'_>> {
        self.start(options, |model, options| model.generate_after(held.take(), prompt, options))
    }

    fn start<'d>(
        &'d self,
        options: &TextOptions,
        mut begin: impl FnMut(&'d Model, &TextOptions) -> Result<TextGeneration<'d>>,
    ) -> Result<TextGeneration<'d>> {
        match self.run(|model| begin(model, options)) {
            Err(error) => {
                self.undraft(error)?;
                let options = TextOptions { draft: Draft::Off, ..options.clone() };
                self.run(|model| begin(model, &options))
            }
            begun => begun,
        }
    }

    /// The next piece of a text of this model, as its iterator gives it. Where the device fails, the text goes on with the next device of the chain: all tokens so
    /// far run again there, none is given out twice.
    pub fn next_piece(&self, text: &mut TextGeneration<'_>) -> Option<Result<String>> {
        let piece = self.piece(text);
        if piece.is_err() {
            text.end();
        }
        piece.transpose()
    }

    fn piece(&self, text: &mut TextGeneration<'_>) -> Result<Option<String>> {
        loop {
            let is_on = |at: &usize| text.is_on(self.model_at(*at));
            let mut at = (0..=self.at()).rfind(is_on).unwrap_or_else(|| self.at());
            match text.next_piece() {
                Err(error @ ModelError::Draft(_)) => {
                    self.undraft(error)?;
                    text.without_draft();
                }
                Err(mut error) => loop {
                    self.after(at, error)?;
                    at = self.at();
                    match text.continue_on(self.model_at(at)) {
                        Ok(()) => break,
                        Err(failed) => error = failed,
                    }
                },
                piece => return piece,
            }
        }
    }

    /// Goes on without a draft model whose device failed, where there is a chain.
    fn undraft(&self, error: ModelError) -> Result<()> {
        match error {
            ModelError::Draft(cause) if self.chain.len() > 1 => {
                self.log().note(Fallback::Undrafted { cause: cause.to_string() }, &*self.tell);
                Ok(())
            }
            error => Err(error),
        }
    }
}

impl Log {
    fn note(&mut self, fallback: Fallback, tell: &Tell) {
        tell(&fallback);
        self.fallbacks.push(fallback);
    }

    /// The model on the next device that opens it, after the one at `at` failed; the error, with those of the devices before, if none does.
    fn next(
        &mut self,
        chain: &[DeviceId],
        mut at: usize,
        mut error: ModelError,
        (open, tell): (&Open, &Tell),
    ) -> Result<(usize, Model)> {
        while error.is_device_fault() && (at + 1 < chain.len() || !self.attempts.is_empty()) {
            let (from, text) = (chain[at], error.to_string());
            match error.into_session() {
                Ok(cause) => self.attempts.push(DeviceAttempt { device: from, cause }),
                Err(other) => return Err(other),
            }
            let Some(&to) = chain.get(at + 1) else {
                let attempts = std::mem::take(&mut self.attempts);
                return Err(SessionError::from(DeviceFallbackError { attempts }).into());
            };
            self.note(Fallback::Moved { from, to, cause: text }, tell);
            at += 1;
            match open(to) {
                Ok(model) => return Ok((at, model)),
                Err(failed) => error = failed,
            }
        }
        Err(error)
    }
}
