//! Steps of quantised models. Scales are powers of two, so that all engines give the same codes.

use crate::generate::Maker;
use crate::graph::{Attr, Id, Info};
use rlx_tensor::{DType, Tensor};

fn is_codes(info: &Info) -> bool {
    matches!(info.dtype, DType::U8 | DType::I8)
}

fn coded(dims: Vec<usize>, dtype: DType) -> Info {
    let (low, high) = if dtype == DType::I8 { (-128.0, 127.0) } else { (0.0, 255.0) };
    Info { dims, dtype, low, high, error: 0.0 }
}

/// A zero point.
fn zero(m: &mut Maker, dtype: DType) -> Id {
    match dtype {
        DType::I8 => {
            let at = m.random.between(-20, 20) as i8;
            m.constant(Tensor::scalar(at), 20.0)
        }
        _ => {
            let at = m.random.between(0, 255) as u8;
            m.constant(Tensor::scalar(at), 255.0)
        }
    }
}

/// A scale, `2^-power`.
fn scale(m: &mut Maker, powers: (i64, i64)) -> Id {
    let power = m.random.between(powers.0, powers.1) as i32;
    m.scalar(2f64.powi(-power))
}

/// Numbers to codes, or codes to numbers.
pub fn quantise(m: &mut Maker) -> Option<()> {
    if m.random.once_in(2) {
        let x = m.pick(is_codes)?;
        let info = m.info(x).clone();
        let (by, zero) = (scale(m, (2, 6)), zero(m, info.dtype));
        let numbers = Info { dtype: DType::F32, low: -256.0 / 4.0, high: 256.0 / 4.0, ..info };
        m.emit("DequantizeLinear", &[x, by, zero], Vec::new(), numbers);
        return Some(());
    }
    let x = m.pick(|i| i.dtype == DType::F32 && i.exact())?;
    let dims = m.info(x).dims.clone();
    let dtype = *m.random.pick(&[DType::U8, DType::I8]);
    let (by, zero) = (scale(m, (0, 5)), zero(m, dtype));
    m.emit("QuantizeLinear", &[x, by, zero], Vec::new(), coded(dims, dtype));
    Some(())
}

/// What follows sums of integers: nothing, or codes again.
fn back(m: &mut Maker) -> (Id, Id) {
    (scale(m, (-8, -4)), zero(m, DType::U8))
}

/// Unsigned codes: some there are, or those of a value that is the same for all.
fn codes(m: &mut Maker, fits: impl Fn(&Info) -> bool) -> Option<Id> {
    if let Some(x) = m.pick(|i| i.dtype == DType::U8 && fits(i)) {
        return Some(x);
    }
    let x = m.pick(|i| i.dtype == DType::F32 && i.exact() && fits(i))?;
    let dims = m.info(x).dims.clone();
    let (by, zero) = (scale(m, (0, 5)), zero(m, DType::U8));
    Some(m.emit("QuantizeLinear", &[x, by, zero], Vec::new(), coded(dims, DType::U8)))
}

pub fn product(m: &mut Maker) -> Option<()> {
    let x = codes(m, |i| i.rank() >= 2)?;
    let mut dims = m.info(x).dims.clone();
    let k = dims[dims.len() - 1];
    let width = *m.random.pick(&[1, 3, 8, 17]);
    let last = dims.len() - 1;
    dims[last] = width;
    let w = m.codes(&[k, width], DType::I8);
    let (x_zero, w_zero) = (zero(m, DType::U8), zero(m, DType::I8));
    if m.random.once_in(2) {
        let most = k as f64 * 255.0 * 148.0;
        let sums = Info { dims, dtype: DType::I32, low: -most, high: most, error: 0.0 };
        m.emit("MatMulInteger", &[x, w, x_zero, w_zero], Vec::new(), sums);
        return Some(());
    }
    let (x_scale, w_scale, (y_scale, y_zero)) = (scale(m, (0, 3)), scale(m, (0, 3)), back(m));
    let operands = [x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero];
    m.emit("QLinearMatMul", &operands, Vec::new(), coded(dims, DType::U8));
    Some(())
}

pub fn convolution(m: &mut Maker) -> Option<()> {
    let x = codes(m, |i| i.rank() == 4 && i.count() <= 1024)?;
    let info = m.info(x).clone();
    let outputs = m.random.between(1, 4) as usize;
    let (size, stride, pad) = (m.random.between(1, 3), m.random.between(1, 2), m.random.between(0, 1));
    let positions = |extent: usize| {
        let room = extent as i64 + 2 * pad - size;
        usize::try_from(room).ok().map(|room| room / stride as usize + 1)
    };
    let dims = vec![info.dims[0], outputs, positions(info.dims[2])?, positions(info.dims[3])?];
    let w = m.codes(&[outputs, info.dims[1], size as usize, size as usize], DType::I8);
    let (x_zero, w_zero) = (zero(m, DType::U8), m.constant(Tensor::scalar(0i8), 0.0));
    let attrs = vec![("strides", Attr::Ints(vec![stride; 2])), ("pads", Attr::Ints(vec![pad; 4]))];
    if m.random.once_in(2) {
        let most = (info.dims[1] * 9) as f64 * 255.0 * 128.0;
        let sums = Info { dims, dtype: DType::I32, low: -most, high: most, error: 0.0 };
        m.emit("ConvInteger", &[x, w, x_zero, w_zero], attrs, sums);
        return Some(());
    }
    let (x_scale, w_scale, (y_scale, y_zero)) = (scale(m, (0, 3)), scale(m, (0, 3)), back(m));
    let mut operands = vec![x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero];
    if m.random.once_in(2) {
        let bias: Vec<i32> = (0..outputs).map(|_| m.random.between(-30_000, 30_000) as i32).collect();
        operands.push(m.constant(Tensor::from_slice(&[outputs], &bias).ok()?, 30_000.0));
    }
    m.emit("QLinearConv", &operands, attrs, coded(dims, DType::U8));
    Some(())
}
