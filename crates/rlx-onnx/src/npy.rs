//! Single arrays as NumPy files (`.npy`).

use crate::error::OnnxError;
use crate::value::Value;
use rlx_tensor::{DType, Tensor};
use std::path::Path;

/// NumPy's spelling of each dtype it has.
const SPELLINGS: &[(&str, DType)] = &[
    ("<f8", DType::F64),
    ("<f4", DType::F32),
    ("<f2", DType::F16),
    ("<i8", DType::I64),
    ("<i4", DType::I32),
    ("<i2", DType::I16),
    ("|i1", DType::I8),
    ("<u8", DType::U64),
    ("<u4", DType::U32),
    ("<u2", DType::U16),
    ("|u1", DType::U8),
    ("|b1", DType::Bool),
    ("<c8", DType::C64),
    ("<c16", DType::C128),
];
const MAGIC: &[u8] = b"\x93NUMPY";
/// Magic, version and header length of version 1.
const PREFIX_BYTES: usize = 10;

/// Reads an array.
///
/// # Errors
/// [`OnnxError::Io`]; [`OnnxError::Tensor`] for a file that is no array of numbers in row-major order.
pub fn read_npy(path: &Path) -> Result<Tensor, OnnxError> {
    let bytes = std::fs::read(path).map_err(|source| OnnxError::Io { path: path.to_owned(), source })?;
    parse(&bytes).map_err(|reason| OnnxError::Tensor { name: path.display().to_string(), reason })
}

/// Writes an array.
///
/// # Errors
/// [`OnnxError::Io`]; [`OnnxError::Tensor`] for a value that NumPy files have no type for.
pub fn write_npy(path: &Path, value: &Value) -> Result<(), OnnxError> {
    let name = || path.display().to_string();
    let Value::Tensor(tensor) = value else {
        let reason = format!("{} has no NumPy form", value.describe());
        return Err(OnnxError::Tensor { name: name(), reason });
    };
    let bytes = format(tensor).map_err(|reason| OnnxError::Tensor { name: name(), reason })?;
    std::fs::write(path, bytes).map_err(|source| OnnxError::Io { path: path.to_owned(), source })
}

fn parse(bytes: &[u8]) -> Result<Tensor, String> {
    let short = || "the file ends within the header".to_owned();
    if !bytes.starts_with(MAGIC) {
        return Err("not a .npy file".to_owned());
    }
    let two = |at: usize| bytes.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let (len, start) = match bytes.get(6).ok_or_else(short)? {
        1 => (two(8).ok_or_else(short)?, PREFIX_BYTES),
        _ => (two(8).ok_or_else(short)? + (two(10).ok_or_else(short)? << 16), PREFIX_BYTES + 2),
    };
    let header = bytes.get(start..start.saturating_add(len)).ok_or_else(short)?;
    let header = std::str::from_utf8(header).map_err(|_| "the header is no text".to_owned())?;
    let field = |name: &str| {
        let at = header.find(&format!("'{name}':")).map(|at| at + name.len() + 3);
        at.map(|at| header[at..].trim_start()).ok_or(format!("the header has no {name}"))
    };
    let spelled = field("descr")?.trim_start_matches('\'');
    let spelled = spelled.split('\'').next().unwrap_or_default();
    let dtype = SPELLINGS.iter().find(|(text, _)| *text == spelled).map(|(_, dtype)| *dtype);
    let dtype = dtype.ok_or_else(|| format!("type {spelled:?} is not supported"))?;
    let shape = field("shape")?.trim_start_matches('(');
    let shape = shape.split(')').next().unwrap_or_default();
    let dims = shape.split(',').map(str::trim).filter(|d| !d.is_empty()).map(str::parse::<usize>);
    let dims =
        dims.collect::<Result<Vec<_>, _>>().map_err(|_| format!("shape {shape:?} is no list of sizes"))?;
    if field("fortran_order")?.starts_with("True") && dims.iter().filter(|&&d| d > 1).count() > 1 {
        return Err("the array is in column-major order; save it with numpy.ascontiguousarray".to_owned());
    }
    Tensor::from_bytes(&dims, dtype, &bytes[start + len..]).map_err(|e| e.to_string())
}

fn format(tensor: &Tensor) -> Result<Vec<u8>, String> {
    let spelled = SPELLINGS.iter().find(|(_, dtype)| *dtype == tensor.dtype()).map(|(text, _)| *text);
    let spelled = spelled.ok_or_else(|| format!("{} has no NumPy form", tensor.dtype()))?;
    let dims: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
    let comma = if dims.len() == 1 { "," } else { "" };
    let mut header =
        format!("{{'descr': '{spelled}', 'fortran_order': False, 'shape': ({}{comma}), }}", dims.join(", "));
    let padded = (PREFIX_BYTES + header.len() + 1).next_multiple_of(64);
    header.push_str(&" ".repeat(padded - PREFIX_BYTES - header.len() - 1));
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(tensor.bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_come_back() {
        let tensor = Tensor::from_slice(&[2, 3], &[1i64, -2, 3, 4, 5, 6]).unwrap();
        assert!(parse(&format(&tensor).unwrap()).unwrap().bits_eq(&tensor));
        let vector = Tensor::from_slice(&[1], &[0.5f32]).unwrap();
        assert!(parse(&format(&vector).unwrap()).unwrap().bits_eq(&vector));
        let scalar = Tensor::scalar(7u8);
        assert!(parse(&format(&scalar).unwrap()).unwrap().bits_eq(&scalar));
    }

    #[test]
    fn what_is_no_array_is_refused() {
        assert!(parse(b"").is_err());
        assert!(parse(b"\x93NUMPY\x01\x00\xff\xff").is_err());
        let whole = format(&Tensor::scalar(1f32)).unwrap();
        assert!(parse(&whole[..whole.len() - 1]).is_err());
    }
}
