//! ONNX models: imported, run by static regions, with what data decides between them.
//!
//! ```no_run
//! use rlx_onnx::OnnxModel;
//! # let image = rlx_tensor::Tensor::scalar(0f32);
//! let model = OnnxModel::open("model.onnx", rlx::devices::Device::Cpu)?;
//! let outputs = model.run(&[("image", image.into())])?;
//! println!("{} {}", outputs[0].0, outputs[0].1.describe());
//! # Ok::<(), rlx_onnx::OnnxError>(())
//! ```

mod coding;
mod compiled;
mod decode;
mod error;
mod import;
mod lower;
mod model;
mod npy;
pub mod ops;
mod prepare;
mod program;
#[doc(hidden)]
pub mod proto;
mod runtime;
pub mod suite;
mod symbolic;
mod value;

pub use coding::Coding;
pub use error::{OnnxError, Refusal};
pub use lower::{Host, Lowering};
pub use model::{Attr, Declared, DeclaredDim, NodeDef, Slot, axes_of, axis_of};
pub use npy::{read_npy, write_npy};
pub use prepare::{CompiledRegion, Prepared};
pub use program::Program;
pub use runtime::{Moved, OnnxReport};
pub use value::{CodedTensor, ElementType, StoredTensor, TextTensor, Value};

use rlx::devices::DeviceId;
use rlx::{CompileOptions, Session};
use std::path::Path;

/// A model with the device it runs on. Regions are compiled when extents are first seen, and kept.
pub struct OnnxModel {
    program: Program,
    runtime: runtime::Runtime,
}

impl OnnxModel {
    /// Imports a model file for a device, or opens what [`OnnxModel::write_compiled`] wrote (a file named `.rlx`).
    ///
    /// # Errors
    /// [`OnnxError`]: what is wrong with the file, by node where one is at fault; a device that cannot be used.
    pub fn open(path: impl AsRef<Path>, device: impl Into<DeviceId>) -> Result<Self, OnnxError> {
        Self::open_on(path, &Session::new(device)?)
    }

    /// As [`OnnxModel::open`], on the device of a session; weights go to a registry of their own.
    ///
    /// # Errors
    /// As [`OnnxModel::open`].
    pub fn open_on(path: impl AsRef<Path>, session: &Session) -> Result<Self, OnnxError> {
        if path.as_ref().extension().is_some_and(|extension| extension == "rlx") {
            return Self::open_compiled(path.as_ref(), session);
        }
        Ok(Self { program: import::open(path.as_ref())?, runtime: runtime::Runtime::on(session) })
    }

    /// Imports a model from memory; it may have no external data.
    ///
    /// # Errors
    /// As [`OnnxModel::open`].
    pub fn from_bytes(bytes: &[u8], session: &Session) -> Result<Self, OnnxError> {
        let bytes = bytes::Bytes::copy_from_slice(bytes);
        let program = import::from_bytes(bytes, decode::ExternalData::default())?;
        Ok(Self { program, runtime: runtime::Runtime::on(session) })
    }

    /// The same model, whose regions go to these devices in turn where those before cannot compile or run them. Each move is in
    /// [`OnnxReport::moved`].
    #[must_use]
    pub fn or_on(self, rest: &[Session]) -> Self {
        Self { runtime: self.runtime.or_on(rest), ..self }
    }

    /// The same model, whose regions are compiled with these options.
    #[must_use]
    pub fn with_options(self, options: CompileOptions) -> Self {
        Self { runtime: self.runtime.with_options(options), ..self }
    }

    /// The graph.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// What became of the nodes in runs so far.
    pub fn report(&self) -> OnnxReport {
        self.runtime.report()
    }

    /// Runs once: named inputs, outputs in the order of the file.
    ///
    /// # Errors
    /// [`OnnxError::Input`] for a name the model does not have, one given twice, a missing one or one of another type;
    /// errors of nodes and regions.
    pub fn run(&self, inputs: &[(&str, Value)]) -> Result<Vec<(String, Value)>, OnnxError> {
        let declared: Vec<(&Declared, bool)> = self.program.inputs().collect();
        let mut given: Vec<Option<Value>> = vec![None; declared.len()];
        for (name, value) in inputs {
            let fail = |reason: String| OnnxError::Input { name: (*name).to_owned(), reason };
            let Some(at) = declared.iter().position(|(d, _)| d.name == *name) else {
                let names = declared.iter().map(|(d, _)| d.name.as_str());
                let nearest = rlx_graph::interpret::nearest_name(name, names);
                let hint = nearest.map_or_else(String::new, |n| format!("; the nearest name is {n:?}"));
                return Err(fail(format!("the model has no such input{hint}")));
            };
            if given[at].is_some() {
                return Err(fail("was given twice".to_owned()));
            }
            declared[at].0.check(value).map_err(fail)?;
            given[at] = Some(value.clone());
        }
        let results = self.program.run(&self.runtime, &given, &[])?;
        Ok(self.program.outputs().map(|d| d.name.clone()).zip(results).collect())
    }
}

impl Declared {
    /// Whether a value may be given for it.
    fn check(&self, value: &Value) -> Result<(), String> {
        let wrong = |expected: String| Err(format!("expected {expected}, found {}", value.describe()));
        let (Some(element), Some(found)) = (self.element, value.element()) else { return Ok(()) };
        if element != found {
            return wrong(element.to_string());
        }
        let (Some(dims), Some(extents)) = (&self.dims, value.dims()) else { return Ok(()) };
        let fits = dims.len() == extents.len()
            && dims.iter().zip(extents).all(|(d, e)| !matches!(d, DeclaredDim::Known(n) if n != e));
        if fits { Ok(()) } else { wrong(format!("{element} of {dims:?}")) }
    }
}

#[cfg(test)]
mod tests;
