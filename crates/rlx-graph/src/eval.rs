//! What reference evaluations are written with: tensors as f64 or i64, indices under broadcasting. Slow and obvious.

use crate::op::EvalError;
use half::{bf16, f16};
use rlx_tensor::rounding::{bf16_of, f16_of};
use rlx_tensor::{DType, DTypeClass, Dim, Tensor, quant};
use std::ops::Range;

/// Applies a cast from each element type to the matching conversion.
macro_rules! read_as {
    ($tensor:expr, $to:ty, $op:literal, { $($dtype:ident: $ty:ty => $convert:expr),* $(,)? }) => {
        match $tensor.dtype() {
            $(DType::$dtype => Ok($tensor.as_slice::<$ty>()?.iter().map($convert).collect()),)*
            dtype => Err(EvalError::Unsupported { op: $op, dtype }),
        }
    };
}

/// The elements as f64; blocks decoded. Exact but for integers beyond 2^53.
pub fn to_f64(tensor: &Tensor) -> Result<Vec<f64>, EvalError> {
    if tensor.dtype().class() == DTypeClass::Quant {
        let mut values = vec![0.0f32; tensor.len()];
        let unsupported = |_| EvalError::Unsupported { op: "decoding blocks", dtype: tensor.dtype() };
        quant::decode(tensor.dtype(), tensor.bytes(), &mut values).map_err(unsupported)?;
        return Ok(values.into_iter().map(f64::from).collect());
    }
    read_as!(tensor, f64, "reading as f64", {
        F64: f64 => |v| *v, F32: f32 => |v| f64::from(*v), F16: f16 => |v| v.to_f64(), BF16: bf16 => |v| v.to_f64(),
        I64: i64 => |v| *v as f64, I32: i32 => |v| f64::from(*v), I16: i16 => |v| f64::from(*v),
        I8: i8 => |v| f64::from(*v), U64: u64 => |v| *v as f64, U32: u32 => |v| f64::from(*v),
        U16: u16 => |v| f64::from(*v), U8: u8 => |v| f64::from(*v), Bool: u8 => |v| f64::from(*v),
    })
}

/// The elements as i64, exact (U64 wraps); floats are refused.
pub fn to_i64(tensor: &Tensor) -> Result<Vec<i64>, EvalError> {
    read_as!(tensor, i64, "reading as i64", {
        I64: i64 => |v| *v, I32: i32 => |v| i64::from(*v), I16: i16 => |v| i64::from(*v), I8: i8 => |v| i64::from(*v),
        U64: u64 => |v| *v as i64, U32: u32 => |v| i64::from(*v), U16: u16 => |v| i64::from(*v),
        U8: u8 => |v| i64::from(*v), Bool: u8 => |v| i64::from(*v),
    })
}

/// A tensor from f64 values, rounded once to a float dtype; to an integer dtype by truncation and saturation; to Bool by `!= 0`.
pub fn from_f64(dims: &[usize], dtype: DType, values: &[f64]) -> Result<Tensor, EvalError> {
    macro_rules! build {
        ($ty:ty, $convert:expr) => {
            Tensor::from_slice::<$ty>(dims, &values.iter().map($convert).collect::<Vec<$ty>>())
        };
    }
    Ok(match dtype {
        DType::F64 => Tensor::from_slice(dims, values),
        DType::F32 => build!(f32, |&v| v as f32),
        DType::F16 => build!(f16, |&v| f16_of(v)),
        DType::BF16 => build!(bf16, |&v| bf16_of(v)),
        DType::Bool => build!(u8, |&v| u8::from(v != 0.0)).and_then(|t| t.bitcast(DType::Bool)),
        DType::I64 => build!(i64, |&v| v as i64),
        DType::I32 => build!(i32, |&v| v as i32),
        DType::I16 => build!(i16, |&v| v as i16),
        DType::I8 => build!(i8, |&v| v as i8),
        DType::U64 => build!(u64, |&v| v as u64),
        DType::U32 => build!(u32, |&v| v as u32),
        DType::U16 => build!(u16, |&v| v as u16),
        DType::U8 => build!(u8, |&v| v as u8),
        dtype => return Err(EvalError::Unsupported { op: "writing from f64", dtype }),
    }?)
}

/// A tensor from i64 values, wrapped to an integer dtype.
pub fn from_i64(dims: &[usize], dtype: DType, values: &[i64]) -> Result<Tensor, EvalError> {
    macro_rules! build {
        ($ty:ty) => {
            Tensor::from_slice::<$ty>(dims, &values.iter().map(|&v| v as $ty).collect::<Vec<$ty>>())
        };
    }
    Ok(match dtype {
        DType::I64 => Tensor::from_slice(dims, values),
        DType::I32 => build!(i32),
        DType::I16 => build!(i16),
        DType::I8 => build!(i8),
        DType::U64 => build!(u64),
        DType::U32 => build!(u32),
        DType::U16 => build!(u16),
        DType::U8 => build!(u8),
        DType::Bool => {
            let truths: Vec<u8> = values.iter().map(|&v| u8::from(v != 0)).collect();
            Tensor::from_slice(dims, &truths).and_then(|t| t.bitcast(DType::Bool))
        }
        dtype => return Err(EvalError::Unsupported { op: "writing from i64", dtype }),
    }?)
}

/// `f` on each element through f64, rounded to the same dtype.
pub fn map_float(x: &Tensor, f: impl Fn(f64) -> f64) -> Result<Tensor, EvalError> {
    let values: Vec<f64> = to_f64(x)?.into_iter().map(f).collect();
    from_f64(x.dims(), x.dtype(), &values)
}

/// `f` on each element through i64, wrapped to the same dtype.
pub fn map_int(x: &Tensor, f: impl Fn(i64) -> i64) -> Result<Tensor, EvalError> {
    let values: Vec<i64> = to_i64(x)?.into_iter().map(f).collect();
    from_i64(x.dims(), x.dtype(), &values)
}

/// The error function.
pub fn erf(x: f64) -> f64 {
    libm::erf(x)
}

/// Extents of the NumPy broadcast of two operands; `None` if they do not broadcast.
pub fn broadcast_dims(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// For each element of `out` in order, the linear index of the element of an operand of extents `dims` broadcast to it.
pub fn broadcast_indices(out: &[usize], dims: &[usize]) -> Vec<usize> {
    let strides = broadcast_strides(out, dims);
    let mut indices = Vec::with_capacity(out.iter().product());
    let mut counter = vec![0usize; out.len()];
    for _ in 0..out.iter().product::<usize>() {
        indices.push(counter.iter().zip(&strides).map(|(c, s)| c * s).sum());
        for axis in (0..out.len()).rev() {
            counter[axis] += 1;
            if counter[axis] < out[axis] {
                break;
            }
            counter[axis] = 0;
        }
    }
    indices
}

/// Row-major strides in elements. Those of a tensor without elements, whose other extents may be of any size, end at the largest number.
pub fn strides(dims: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; dims.len()];
    for axis in (1..dims.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(dims[axis]);
    }
    strides
}

/// Strides of an operand of extents `dims` seen as `out`: 0 along broadcast axes.
pub fn broadcast_strides(out: &[usize], dims: &[usize]) -> Vec<usize> {
    let own = strides(dims);
    (0..out.len())
        .map(|axis| match (axis + dims.len()).checked_sub(out.len()) {
            Some(j) if dims[j] != 1 => own[j],
            _ => 0,
        })
        .collect()
}

/// Dims that must hold no symbols any more.
pub fn known_dims(dims: &[Dim]) -> Result<Vec<usize>, EvalError> {
    let known: Option<Vec<usize>> = dims.iter().map(Dim::known).collect();
    known
        .ok_or_else(|| EvalError::Value { operand: 0, reason: format!("dims {dims:?} hold unbound symbols") })
}

/// A tensor of `dims` whose element at each position is the element of `x` at the linear index given for it.
pub fn gather_elements(
    x: &Tensor,
    dims: &[usize],
    index: impl Fn(&[usize]) -> usize,
) -> Result<Tensor, EvalError> {
    let Some(element) = x.dtype().element_bytes() else {
        return Err(EvalError::Unsupported { op: "moving elements", dtype: x.dtype() });
    };
    let mut result = Tensor::zeros(dims, x.dtype())?;
    let mut counter = vec![0usize; dims.len()];
    for target in result.bytes_mut().chunks_mut(element) {
        target.copy_from_slice(&x.bytes()[index(&counter) * element..][..element]);
        for axis in (0..dims.len()).rev() {
            counter[axis] += 1;
            if counter[axis] < dims[axis] {
                break;
            }
            counter[axis] = 0;
        }
    }
    Ok(result)
}

/// The rows of each sequence: `starts [batch + 1]`, first 0, ascending, last `rows`; the operand is named in the error.
pub fn sequence_ranges(starts: &Tensor, rows: usize, operand: usize) -> Result<Vec<Range<usize>>, EvalError> {
    let starts = to_i64(starts)?;
    let ascending = starts.windows(2).all(|w| w[0] <= w[1]);
    if !ascending || starts.first() != Some(&0) || starts.last() != i64::try_from(rows).ok().as_ref() {
        let reason = format!("sequence starts {starts:?} must ascend from 0 to {rows}");
        return Err(EvalError::Value { operand, reason });
    }
    Ok(starts.windows(2).map(|w| w[0] as usize..w[1] as usize).collect())
}
