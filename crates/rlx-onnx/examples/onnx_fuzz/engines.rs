//! The ways a model is run, and how their results are held against each other.

use crate::graph::{Id, Model, name};
use crate::oracle::{Oracle, spelled};
use rlx::backend::reference::ReferenceBackend;
use rlx::{CompileOptions, Session};
use rlx_graph::passes::{PASSES, PassOptions};
use rlx_onnx::{OnnxModel, Value};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One way to run a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The CPU with every pass.
    Optimised,
    /// The CPU with none but legalisation.
    Unoptimised,
    /// The CPU, extents of inputs left open.
    Symbolic,
    /// ONNX Runtime.
    OnnxRuntime,
}

/// All of them.
pub const WAYS: [Way; 4] = [Way::Optimised, Way::Unoptimised, Way::Symbolic, Way::OnnxRuntime];

/// A result that is not what it must be.
#[derive(Debug, Clone)]
pub struct Difference {
    pub way: Way,
    pub reason: String,
}

/// Devices to run on.
pub struct Engines {
    reference: Session,
    cpu: Session,
    oracle: Option<Oracle>,
    /// Models that ONNX Runtime does not take, with its messages.
    pub refused: Vec<String>,
}

impl Engines {
    pub fn new(oracle: Option<Oracle>) -> Result<Self, String> {
        let cpu = Session::new(rlx::devices::Device::Cpu).map_err(|e| e.to_string())?;
        let reference = Session::with_backend(Arc::new(ReferenceBackend::default()));
        Ok(Self { reference, cpu, oracle, refused: Vec::new() })
    }

    pub fn has_oracle(&self) -> bool {
        self.oracle.is_some()
    }

    /// The first result that differs from the reference evaluation; an error if that itself fails.
    pub fn differ(&mut self, model: &Model) -> Result<Option<Difference>, String> {
        let expected = run(&model.file(false, false), model, &self.reference, unoptimised())?;
        for way in WAYS {
            let found = match way {
                Way::Optimised => run(&model.file(false, false), model, &self.cpu, CompileOptions::default()),
                Way::Unoptimised => run(&model.file(false, false), model, &self.cpu, unoptimised()),
                Way::Symbolic => run(&model.file(true, false), model, &self.cpu, CompileOptions::default()),
                Way::OnnxRuntime => match &mut self.oracle {
                    None => continue,
                    Some(oracle) => match oracle.run(model)? {
                        Ok(found) => Ok(found),
                        Err(message) => {
                            self.refused.push(message);
                            continue;
                        }
                    },
                },
            };
            let found = match found {
                Ok(found) => found,
                Err(reason) => return Ok(Some(Difference { way, reason })),
            };
            for ((&id, a), b) in model.outputs.iter().zip(&expected).zip(&found) {
                if let Some(reason) = compare(a, b, model.values[id].error) {
                    return Ok(Some(Difference { way, reason }));
                }
            }
        }
        Ok(None)
    }

    /// The reference results of every value that a node makes.
    pub fn values(&self, model: &Model) -> Result<Vec<(Id, Value)>, String> {
        let mut all = model.clone();
        all.outputs = model.nodes.iter().flat_map(|node| node.outputs.iter().copied()).collect();
        let results = run(&all.file(false, false), &all, &self.reference, unoptimised())?;
        Ok(all.outputs.into_iter().zip(results).collect())
    }
}

fn unoptimised() -> CompileOptions {
    let skip = PASSES.iter().map(|pass| pass.name).filter(|name| *name != "legalise");
    let passes = PassOptions { skip: skip.map(str::to_owned).collect(), ..PassOptions::default() };
    CompileOptions { passes, ..CompileOptions::default() }
}

fn run(file: &[u8], model: &Model, session: &Session, options: CompileOptions) -> Result<Vec<Value>, String> {
    let work = || {
        let opened = OnnxModel::from_bytes(file, session).map_err(|e| e.to_string())?.with_options(options);
        let names: Vec<String> = model.inputs.iter().map(|(id, _)| name(*id)).collect();
        let given = names.iter().zip(&model.inputs).map(|(name, (_, t))| (name.as_str(), t.clone().into()));
        let results = opened.run(&given.collect::<Vec<_>>()).map_err(|e| e.to_string())?;
        Ok(results.into_iter().map(|(_, value)| value).collect())
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

/// Where two results differ by more than both may be off.
fn compare(a: &Value, b: &Value, error: f64) -> Option<String> {
    if a.element() != b.element() || a.dims() != b.dims() {
        return Some(format!("expected {}, found {}", spelled(a), spelled(b)));
    }
    let (Ok(x), Ok(y)) = (a.floats(), b.floats()) else { return Some("no numbers".to_owned()) };
    let allowed = 2.0 * error;
    let wrong = |(_, (x, y)): &(usize, (&f64, &f64))| {
        !(x == y || (x.is_nan() && y.is_nan()) || (**x - **y).abs() <= allowed)
    };
    let (at, (x, y)) = x.iter().zip(&y).enumerate().find(wrong)?;
    Some(format!("element {at} of {}: expected {x}, found {y}, allowed {allowed:.2e}", spelled(a)))
}
