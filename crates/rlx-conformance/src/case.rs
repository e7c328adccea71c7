//! Op cases: inputs, attributes and expected results, independent of any engine.
//!
//! `cases/<op>.json` is a list of objects, written by `scripts/cases/make.py`:
//!
//! | field | meaning |
//! |---|---|
//! | `name` | what the case shows |
//! | `attrs` | the attributes as in the graph's text form |
//! | `terms` | the longest sum behind an element of a result: tolerances derive from it |
//! | `inputs` | operands: `dtype`, `dims`, `data` in row-major order; `"nan"`, `"inf"`, `"-inf"` stand for themselves |
//! | `states` | positions of operands that are states |
//! | `outputs` | the results, then the updated states in order |

use rlx_graph::eval::{from_f64, from_i64, to_f64, to_i64};
use rlx_graph::{Graph, ParseError};
use rlx_tensor::{DType, Shape, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// One case of one op.
#[derive(Debug, Clone)]
pub struct Case {
    /// The op's text name.
    pub op: String,
    /// What the case shows.
    pub name: String,
    /// Attributes in text form.
    pub attrs: String,
    /// The longest sum behind an element of a result.
    pub terms: usize,
    /// Operands.
    pub inputs: Vec<Tensor>,
    /// Positions of operands that are states.
    pub states: Vec<usize>,
    /// Expected results, then expected states.
    pub outputs: Vec<Tensor>,
}

/// Why the cases cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// A file or folder cannot be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A file is no list of cases.
    #[error("{path}, case {case}: {reason}")]
    Form {
        /// The file.
        path: PathBuf,
        /// Position in the file.
        case: usize,
        /// What is wrong.
        reason: String,
    },
    /// The case's attributes or dims make no graph.
    #[error("case {case:?} of {op}: {cause} in\n{text}")]
    Graph {
        /// The op.
        op: String,
        /// The case.
        case: String,
        /// Why.
        cause: ParseError,
        /// The graph's text.
        text: String,
    },
}

/// A result that is not what a case expects.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("case {case:?} of {op}, result {result}: {reason}")]
pub struct Difference {
    /// The op.
    pub op: String,
    /// The case.
    pub case: String,
    /// Which result.
    pub result: usize,
    /// How it differs.
    pub reason: String,
}

/// Every case of every op, by file name.
pub fn cases() -> Result<Vec<Case>, CaseError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause| CaseError::Io { path, cause }
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(failed(&folder))? {
        paths.push(entry.map_err(failed(&folder))?.path());
    }
    paths.sort();
    let mut cases = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
        let form = |case, reason: String| CaseError::Form { path: path.clone(), case, reason };
        let entries: Vec<Value> = serde_json::from_str(&text).map_err(|e| form(0, e.to_string()))?;
        let op = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        for (i, entry) in entries.iter().enumerate() {
            cases
                .push(read_case(op, entry).ok_or_else(|| form(i, "a field is missing or malformed".into()))?);
        }
    }
    Ok(cases)
}

fn read_case(op: &str, entry: &Value) -> Option<Case> {
    let text = |key: &str| entry.get(key)?.as_str().map(str::to_owned);
    let tensors = |key: &str| entry.get(key)?.as_array()?.iter().map(read_tensor).collect::<Option<Vec<_>>>();
    let size = |v: &Value| v.as_u64().and_then(|v| usize::try_from(v).ok());
    Some(Case {
        op: op.to_owned(),
        name: text("name")?,
        attrs: text("attrs")?,
        terms: entry.get("terms").and_then(size)?,
        inputs: tensors("inputs")?,
        states: entry.get("states")?.as_array()?.iter().map(size).collect::<Option<_>>()?,
        outputs: tensors("outputs")?,
    })
}

fn read_tensor(value: &Value) -> Option<Tensor> {
    let dtype: DType = value.get("dtype")?.as_str()?.parse().ok()?;
    let dims =
        value.get("dims")?.as_array()?.iter().map(|d| d.as_u64().and_then(|d| usize::try_from(d).ok()));
    let dims: Vec<usize> = dims.collect::<Option<_>>()?;
    let data = value.get("data")?.as_array()?;
    if dtype.is_float() {
        let number = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok());
        let values: Vec<f64> = data.iter().map(number).collect::<Option<_>>()?;
        return from_f64(&dims, dtype, &values).ok();
    }
    let values: Vec<i64> = data.iter().map(Value::as_i64).collect::<Option<_>>()?;
    from_i64(&dims, dtype, &values).ok()
}

impl Case {
    /// The op as a graph of one node: operands are inputs (or states) `x0`, `x1`, ..; results are outputs `y0`, `y1`, ..
    pub fn graph(&self) -> Result<Graph, CaseError> {
        self.graph_with_params(&[])
    }

    /// As [`Case::graph`], with these operands as params.
    pub fn graph_with_params(&self, params: &[usize]) -> Result<Graph, CaseError> {
        let shape = |t: &Tensor| Shape::new(t.dims(), t.dtype());
        let mut text = String::from("graph \"case\" {\n");
        for (i, input) in self.inputs.iter().enumerate() {
            let is_state = self.states.contains(&i);
            let kind = if is_state {
                "state"
            } else if params.contains(&i) {
                "param"
            } else {
                "input"
            };
            let _ = writeln!(text, "  {kind} @x{i} : {}", shape(input));
        }
        let count = self.outputs.len() - self.states.len();
        let results: Vec<String> =
            self.outputs[..count].iter().enumerate().map(|(i, t)| format!("%{i} : {}", shape(t))).collect();
        let operands: Vec<String> = (0..self.inputs.len()).map(|i| format!("@x{i}")).collect();
        let outputs: Vec<String> = (0..count).map(|i| format!("\"y{i}\": %{i}")).collect();
        let (results, operands, outputs) = (results.join(", "), operands.join(", "), outputs.join(", "));
        let _ = writeln!(
            text,
            "  {results} = {}({operands}) {{{}}}\n  return {outputs}\n}}",
            self.op, self.attrs
        );
        rlx_graph::text::parse(&text).map_err(|cause| CaseError::Graph {
            op: self.op.clone(),
            case: self.name.clone(),
            cause,
            text,
        })
    }

    /// Operands that are inputs, by name.
    pub fn named_inputs(&self) -> Vec<(String, Tensor)> {
        let inputs = self.inputs.iter().enumerate().filter(|(i, _)| !self.states.contains(i));
        inputs.map(|(i, t)| (format!("x{i}"), t.clone())).collect()
    }

    /// Operands that are states, by name.
    pub fn named_states(&self) -> BTreeMap<String, Tensor> {
        self.states.iter().map(|&i| (format!("x{i}"), self.inputs[i].clone())).collect()
    }

    /// Compares results, then states, with what is expected. Integers and Bool must be equal. A float may be off by
    /// `(terms + 8) * unit roundoff * roundings` of the largest magnitude among results (and operands, where `roundings > 1`):
    /// `roundings` is 1 for an engine that rounds once, about the number of ops for one that rounds after each.
    pub fn compare(
        &self,
        results: &[(String, Tensor)],
        states: &BTreeMap<String, Tensor>,
        roundings: usize,
    ) -> Result<(), Difference> {
        let updated = self.states.iter().filter_map(|i| states.get(&format!("x{i}")));
        let found: Vec<&Tensor> = results.iter().map(|(_, t)| t).chain(updated).collect();
        let differs = |result: usize, reason: String| {
            Err(Difference { op: self.op.clone(), case: self.name.clone(), result, reason })
        };
        if found.len() != self.outputs.len() {
            return differs(0, format!("{} results, expected {}", found.len(), self.outputs.len()));
        }
        for (i, (found, expected)) in found.iter().zip(&self.outputs).enumerate() {
            let operands: &[Tensor] = if roundings > 1 { &self.inputs } else { &[] };
            let magnitude = operands.iter().chain([expected]).map(largest).fold(1.0, f64::max);
            let unit = f64::from(f32::EPSILON) / 2.0;
            let tolerance = (self.terms + 8) as f64 * unit * roundings as f64 * magnitude;
            if let Err(reason) = compare_tensor(found, expected, tolerance) {
                return differs(i, reason);
            }
        }
        Ok(())
    }
}

fn largest(tensor: &Tensor) -> f64 {
    match tensor.dtype().is_float() {
        true => to_f64(tensor)
            .unwrap_or_default()
            .into_iter()
            .filter(|v| v.is_finite())
            .fold(0.0, |a, v| a.max(v.abs())),
        false => 0.0,
    }
}

fn compare_tensor(found: &Tensor, expected: &Tensor, tolerance: f64) -> Result<(), String> {
    if found.dims() != expected.dims() || found.dtype() != expected.dtype() {
        let shape = |t: &Tensor| Shape::new(t.dims(), t.dtype());
        return Err(format!("is {}, expected {}", shape(found), shape(expected)));
    }
    if !expected.dtype().is_float() {
        let (a, b) = (to_i64(found), to_i64(expected));
        return if a == b { Ok(()) } else { Err(format!("{a:?}, expected {b:?}")) };
    }
    let (a, b) = (to_f64(found).map_err(|e| e.to_string())?, to_f64(expected).map_err(|e| e.to_string())?);
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let same = (a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= tolerance;
        if !same {
            return Err(format!("element {i} is {a:e}, expected {b:e} within {tolerance:e}"));
        }
    }
    Ok(())
}
