//! Products with weights of a few bits in blocks.

use crate::error::{Refusal, invalid, unsupported};
use crate::lower::Lowering;
use crate::value::Value;
use half::f16;
use rlx_graph::ValueId;
use rlx_graph::ops::binary::BinaryOp;
use rlx_graph::ops::linear::Linear;
use rlx_tensor::rounding::f16_of;
use rlx_tensor::{DType, Shape, Tensor};

/// Inputs of a block as it is stored.
const STORED: usize = 32;
/// The level of accuracy that lets rows be quantised to eight bits.
const INT8: i64 = 4;

/// A weight `[n, k]`: codes, a scale for each block of a row, zero points.
struct Blocks {
    n: usize,
    k: usize,
    block: usize,
    bits: usize,
    codes: Vec<u8>,
    scales: Vec<f64>,
    zeros: Option<Value>,
}

impl Blocks {
    fn read(l: &mut Lowering<'_>) -> Result<Self, Refusal> {
        let size = |name: &str| usize::try_from(l.node.int(name, 0).unwrap_or(0)).unwrap_or(0);
        let (k, n, block, bits) = (size("K"), size("N"), size("block_size"), size("bits").max(1));
        let bits = if l.node.attrs.contains_key("bits") { bits } else { 4 };
        if !matches!(bits, 2 | 4 | 8) || block == 0 || k == 0 || n == 0 {
            return unsupported(format!("{bits} bits in blocks of {block}"));
        }
        let codes = l.known(1)?.tensor()?.bytes().to_vec();
        let scales = l.known(2)?.floats()?;
        let zeros = if l.has(3) { Some(l.known(3)?) } else { None };
        let made = Self { n, k, block, bits, codes, scales, zeros };
        if made.codes.len() != n * made.blocks() * made.block_bytes()
            || made.scales.len() != n * made.blocks()
        {
            let (bytes, scales) = (made.codes.len(), made.scales.len());
            return invalid(format!("{bytes} bytes and {scales} scales for {n} x {k}"));
        }
        Ok(made)
    }

    fn blocks(&self) -> usize {
        self.k.div_ceil(self.block)
    }

    fn per_byte(&self) -> usize {
        8 / self.bits
    }

    fn block_bytes(&self) -> usize {
        self.block.div_ceil(self.per_byte())
    }

    fn at(&self, bytes: &[u8], i: usize) -> u8 {
        let mask = ((1u32 << self.bits) - 1) as u8;
        bytes[i / self.per_byte()] >> (i % self.per_byte() * self.bits) & mask
    }

    fn code(&self, row: usize, i: usize) -> u8 {
        let block = row * self.blocks() + i / self.block;
        self.at(&self.codes[block * self.block_bytes()..][..self.block_bytes()], i % self.block)
    }

    fn zero(&self, row: usize, block: usize) -> Result<f64, Refusal> {
        let bytes = self.blocks().div_ceil(self.per_byte());
        Ok(match &self.zeros {
            None => f64::from(1u32 << (self.bits - 1)),
            Some(given) if given.tensor()?.dtype() == DType::U8 => {
                f64::from(self.at(&given.tensor()?.bytes()[row * bytes..(row + 1) * bytes], block))
            }
            Some(given) => given.floats()?[row * self.blocks() + block],
        })
    }

    /// `[n, k]` F32.
    fn numbers(&self) -> Result<Tensor, Refusal> {
        let mut weight = vec![0f32; self.n * self.k];
        for row in 0..self.n {
            for block in 0..self.blocks() {
                let (scale, zero) = (self.scales[row * self.blocks() + block], self.zero(row, block)?);
                for i in block * self.block..((block + 1) * self.block).min(self.k) {
                    weight[row * self.k + i] = ((f64::from(self.code(row, i)) - zero) * scale) as f32;
                }
            }
        }
        Ok(Tensor::from_slice(&[self.n, self.k], &weight)?)
    }

    /// The type of blocks that holds these codes as they are; scales are rounded to F16.
    fn stored_as(&self) -> Option<DType> {
        let whole = self.k.is_multiple_of(STORED) && self.block.is_multiple_of(STORED);
        let (least, most) = (f16::MIN_POSITIVE.to_f64(), f16::MAX.to_f64());
        let small = self.scales.iter().all(|&s| s == 0.0 || (least..most).contains(&s.abs()));
        match self.bits {
            _ if !whole || !small || self.zeros.is_some() => None,
            4 => Some(DType::Q4_0),
            8 => Some(DType::Q8_0),
            _ => None,
        }
    }

    fn stored(&self, dtype: DType) -> Result<Tensor, Refusal> {
        let mut bytes = Vec::new();
        for row in 0..self.n {
            for start in (0..self.k).step_by(STORED) {
                let scale = f16_of(self.scales[row * self.blocks() + start / self.block]);
                bytes.extend_from_slice(&scale.to_le_bytes());
                let code = |i: usize| self.code(row, start + i);
                match self.bits {
                    4 => bytes.extend((0..STORED / 2).map(|i| code(i) | code(i + STORED / 2) << 4)),
                    // Codes count from 128.
                    _ => bytes.extend((0..STORED).map(|i| code(i) ^ 0x80)),
                }
            }
        }
        Ok(Tensor::from_bytes(&[self.n, self.k], dtype, &bytes)?)
    }
}

/// Weights stay in their blocks where the node lets rows be quantised too, else they are widened to F32 once.
pub(super) fn matmul_n_bits(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    if l.has(4) {
        return unsupported("an order of groups");
    }
    let weight = Blocks::read(l)?;
    let dtype = l.dtype(0)?;
    let x = l.value(0)?;
    let x = l.cast(x, DType::F32)?;
    let dims = [weight.n, weight.k];
    let packs = l.node.int("accuracy_level", 0)? == INT8 && l.is_weight(1) && l.is_weight(2);
    let w = match weight.stored_as().filter(|_| packs) {
        Some(blocks) => l.derived_weight(1, "blocks", Shape::new(&dims, blocks), || weight.stored(blocks))?,
        None => l.derived(1, "numbers", &dims, || weight.numbers())?,
    };
    let mut y = l.add(Linear::plain(), &[x, w])?;
    if let Some(bias) = l.optional(5)? {
        let bias = l.cast(bias, DType::F32)?;
        y = l.expand().binary(BinaryOp::Add, y, bias)?;
    }
    Ok(vec![l.cast(y, dtype)?])
}

#[cfg(test)]
mod tests {
    use crate::proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetId, TensorProto, TensorType, TypeProto,
        ValueInfoProto,
    };
    use crate::{OnnxModel, Value};
    use prost::Message;
    use rlx::Session;
    use rlx::devices::Device;
    use rlx_tensor::Tensor;

    const ROWS: usize = 3;
    const N: usize = 40;
    const K: usize = 128;
    const BLOCK: usize = 64;

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..count).map(|_| next() * 2.0 - 1.0).collect()
    }

    fn initialiser(name: &str, dims: &[i64], data_type: i32, bytes: &[u8]) -> TensorProto {
        let raw_data = Some(bytes.to_vec().into());
        TensorProto { name: name.into(), dims: dims.to_vec(), data_type, raw_data, ..TensorProto::default() }
    }

    fn value(name: &str) -> ValueInfoProto {
        let tensor = Some(TensorType { elem_type: 1, shape: None });
        ValueInfoProto { name: name.into(), value_type: Some(TypeProto { tensor, ..TypeProto::default() }) }
    }

    /// The product with these codes and scales, one node.
    fn product(bits: usize, level: i64, codes: &[u8], scales: &[f32], x: &[f32]) -> Vec<f64> {
        let int = |name: &str, i: i64| AttributeProto {
            name: name.into(),
            kind: 2,
            i,
            ..AttributeProto::default()
        };
        let sizes = [("K", K), ("N", N), ("bits", bits), ("block_size", BLOCK)];
        let mut attribute: Vec<AttributeProto> = sizes.iter().map(|&(name, i)| int(name, i as i64)).collect();
        attribute.push(int("accuracy_level", level));
        let node = NodeProto {
            op_type: "MatMulNBits".into(),
            domain: "com.microsoft".into(),
            input: ["x", "codes", "scales"].map(str::to_owned).to_vec(),
            output: vec!["y".into()],
            attribute,
            ..NodeProto::default()
        };
        let blocks = (K / BLOCK) as i64;
        let dims = [N as i64, blocks, (BLOCK * bits / 8) as i64];
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let graph = GraphProto {
            name: "g".into(),
            node: vec![node],
            initializer: vec![
                initialiser("codes", &dims, 2, codes),
                initialiser("scales", &[N as i64 * blocks], 1, &scale_bytes),
            ],
            input: vec![value("x")],
            output: vec![value("y")],
            ..GraphProto::default()
        };
        let opset = |domain: &str, version| OperatorSetId { domain: domain.into(), version };
        let opset_import = vec![opset("", 21), opset("com.microsoft", 1)];
        let model =
            ModelProto { ir_version: Some(10), graph: Some(graph), opset_import, ..ModelProto::default() };
        let session = Session::new(Device::Cpu).unwrap();
        let model = OnnxModel::from_bytes(&model.encode_to_vec(), &session).unwrap();
        let x = Value::Tensor(Tensor::from_slice(&[ROWS, K], x).unwrap());
        model.run(&[("x", x)]).unwrap()[0].1.floats().unwrap()
    }

    #[test]
    fn blocks_stay_packed_where_rows_may_be_quantised() {
        for bits in [4, 8] {
            let codes: Vec<u8> =
                numbers(1, N * K * bits / 8).iter().map(|v| (v * 127.0 + 128.0) as u8).collect();
            let scales: Vec<f32> = numbers(2, N * K / BLOCK).iter().map(|v| 0.02 + v.abs() * 0.01).collect();
            let x = numbers(3, ROWS * K);
            let (wide, packed) =
                (product(bits, 0, &codes, &scales, &x), product(bits, 4, &codes, &scales, &x));
            assert_ne!(wide, packed, "{bits} bits: nothing was quantised");
            let half = 1u32 << (bits - 1);
            let weight = |n: usize, i: usize| {
                let code = match bits {
                    8 => codes[n * K + i],
                    _ => codes[(n * K + i) / 2] >> (i % 2 * 4) & 15,
                };
                (f64::from(code) - f64::from(half)) * f64::from(scales[n * K / BLOCK + i / BLOCK])
            };
            for row in 0..ROWS {
                for n in 0..N {
                    let (mut exact, mut bound) = (0.0, 0.0);
                    for i in 0..K {
                        let cell = &x[row * K + i / 32 * 32..][..32];
                        let most = cell.iter().fold(0f32, |a, b| a.max(b.abs()));
                        let (v, w) = (f64::from(x[row * K + i]), weight(n, i));
                        exact += v * w;
                        // Half a step of a row's cell, half a unit in the last place of an F16 scale, and the sum's own rounding.
                        bound += w.abs() * (f64::from(most) / 254.0 + v.abs() * (0.5 / 1024.0 + 1e-5));
                    }
                    let at = row * N + n;
                    assert!((wide[at] - exact).abs() <= 1e-4, "{bits} bits: {} {exact}", wide[at]);
                    assert!(
                        (packed[at] - exact).abs() <= bound,
                        "{bits} bits: {} {exact} {bound}",
                        packed[at]
                    );
                }
            }
        }
    }
}
