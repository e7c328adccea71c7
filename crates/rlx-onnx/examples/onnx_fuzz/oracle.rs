//! ONNX Runtime in a Python process, for `scripts/fuzz/onnxruntime_oracle.py`.

use crate::graph::{Model, name};
use rlx_onnx::{ElementType, Value};
use rlx_tensor::{DType, Tensor, byte_count};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const SCRIPT: &str = "scripts/fuzz/onnxruntime_oracle.py";

/// The process.
pub struct Oracle {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
}

const CODES: &[(u8, DType)] = &[
    (1, DType::F32),
    (2, DType::U8),
    (3, DType::I8),
    (6, DType::I32),
    (7, DType::I64),
    (9, DType::Bool),
    (11, DType::F64),
];

impl Oracle {
    pub fn start(python: &Path) -> Result<Self, String> {
        let mut command = Command::new(python);
        command.arg(SCRIPT).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", python.display()))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("the oracle has no pipes".to_owned());
        };
        Ok(Self { child, to: BufWriter::new(to), from: BufReader::new(from) })
    }

    /// Its results, or its message if it does not take the model.
    pub fn run(&mut self, model: &Model) -> Result<Result<Vec<Value>, String>, String> {
        self.ask(model).map_err(|e| format!("the oracle is gone: {e}"))
    }

    fn ask(&mut self, model: &Model) -> std::io::Result<Result<Vec<Value>, String>> {
        let file = model.file(false, false);
        self.send(&file)?;
        self.to.write_all(&(model.inputs.len() as u32).to_le_bytes())?;
        for (id, tensor) in &model.inputs {
            self.send(name(*id).as_bytes())?;
            let code = CODES.iter().find(|(_, dtype)| *dtype == tensor.dtype()).map_or(0, |(code, _)| *code);
            self.to.write_all(&[code])?;
            self.to.write_all(&(tensor.dims().len() as u32).to_le_bytes())?;
            for &extent in tensor.dims() {
                self.to.write_all(&(extent as u64).to_le_bytes())?;
            }
            self.to.write_all(tensor.bytes())?;
        }
        self.to.flush()?;
        if self.byte()? != 0 {
            let count = self.number()? as usize;
            return Ok(Err(String::from_utf8_lossy(&self.bytes(count)?).into_owned()));
        }
        let count = self.number()?;
        (0..count).map(|_| self.array()).collect::<std::io::Result<Vec<Value>>>().map(Ok)
    }

    fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.to.write_all(&(bytes.len() as u32).to_le_bytes())?;
        self.to.write_all(bytes)
    }

    fn bytes(&mut self, count: usize) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.from.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn byte(&mut self) -> std::io::Result<u8> {
        Ok(self.bytes(1)?[0])
    }

    fn number(&mut self) -> std::io::Result<u32> {
        let mut bytes = [0; 4];
        self.from.read_exact(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn array(&mut self) -> std::io::Result<Value> {
        let wrong = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
        let code = self.byte()?;
        let dtype = CODES.iter().find(|(known, _)| *known == code).map(|(_, dtype)| *dtype);
        let dtype = dtype.ok_or_else(|| wrong(format!("element type {code}")))?;
        let rank = self.number()?;
        let mut dims = Vec::new();
        for _ in 0..rank {
            let mut extent = [0; 8];
            self.from.read_exact(&mut extent)?;
            dims.push(u64::from_le_bytes(extent) as usize);
        }
        let bytes = byte_count(&dims, dtype).ok_or_else(|| wrong(format!("dims {dims:?}")))?;
        let bytes = self.bytes(bytes)?;
        Tensor::from_bytes(&dims, dtype, &bytes).map(Value::Tensor).map_err(|e| wrong(e.to_string()))
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A dtype by name, for messages.
pub fn spelled(value: &Value) -> String {
    match value.element() {
        Some(ElementType::Plain(dtype)) => format!("{dtype}{:?}", value.dims().unwrap_or_default()),
        _ => value.describe(),
    }
}
