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
    /// The block whose scale and zero point an input has, where it is not the one it lies in.
    groups: Option<Vec<usize>>,
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
        let size_of = |group: i64| usize::try_from(group).unwrap_or(usize::MAX);
        let groups = l.ints_opt(4)?.map(|groups| groups.into_iter().map(size_of).collect());
        let made = Self { n, k, block, bits, codes, scales, zeros, groups };
        let scales = n.checked_mul(made.blocks());
        let bytes = scales.and_then(|blocks| blocks.checked_mul(made.block_bytes()));
        if bytes != Some(made.codes.len()) || scales != Some(made.scales.len()) {
            let (bytes, scales) = (made.codes.len(), made.scales.len());
            return invalid(format!("{bytes} bytes and {scales} scales for {n} x {k}"));
        }
        if let Some(groups) = &made.groups
            && (groups.len() < k || groups.iter().any(|&group| group >= made.blocks()))
        {
            return invalid(format!("groups of {k} inputs must be below {}", made.blocks()));
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
                match given.tensor()?.bytes().get(row * bytes..(row + 1) * bytes) {
                    Some(packed) => f64::from(self.at(packed, block)),
                    None => return invalid("zero points do not fit the blocks of the weights"),
                }
            }
            Some(given) => match given.floats()?.get(row * self.blocks() + block) {
                Some(&zero) => zero,
                None => return invalid("zero points do not fit the blocks of the weights"),
            },
        })
    }

    /// The block whose scale and zero point an input has.
    fn group(&self, i: usize) -> usize {
        self.groups.as_ref().map_or(i / self.block, |groups| groups[i])
    }

    /// `[n, k]` F32.
    fn numbers(&self) -> Result<Tensor, Refusal> {
        let mut weight = vec![0f32; self.n * self.k];
        for row in 0..self.n {
            for i in 0..self.k {
                let group = self.group(i);
                let (scale, zero) = (self.scales[row * self.blocks() + group], self.zero(row, group)?);
                weight[row * self.k + i] = ((f64::from(self.code(row, i)) - zero) * scale) as f32;
            }
        }
        Ok(Tensor::from_slice(&[self.n, self.k], &weight)?)
    }

    /// Codes less their zero points, if all are whole.
    fn centred(&self) -> Result<Option<Vec<i16>>, Refusal> {
        let mut centred = vec![0; self.n * self.k];
        for row in 0..self.n {
            for block in 0..self.blocks() {
                let zero = self.zero(row, block)?;
                if zero.fract() != 0.0 || zero.abs() > 255.0 {
                    return Ok(None);
                }
                for i in block * self.block..((block + 1) * self.block).min(self.k) {
                    centred[row * self.k + i] = i16::from(self.code(row, i)) - zero as i16;
                }
            }
        }
        Ok(Some(centred))
    }

    /// The type of blocks that holds codes less their zero points as they are, and these; scales are rounded to F16.
    fn stored_as(&self) -> Result<Option<(DType, Vec<i16>)>, Refusal> {
        let whole = self.k.is_multiple_of(STORED) && self.block.is_multiple_of(STORED);
        let (least, most) = (f16::MIN_POSITIVE.to_f64(), f16::MAX.to_f64());
        let small = self.scales.iter().all(|&s| s == 0.0 || (least..most).contains(&s.abs()));
        if !whole || !small || self.groups.is_some() {
            return Ok(None);
        }
        let Some(centred) = self.centred()? else { return Ok(None) };
        let within = |least: i16, most: i16| centred.iter().all(|code| (least..=most).contains(code));
        let dtype = match (within(-8, 7), within(-128, 127)) {
            (true, _) => DType::Q4_0,
            (_, true) => DType::Q8_0,
            _ => return Ok(None),
        };
        Ok(Some((dtype, centred)))
    }

    fn stored(&self, dtype: DType, centred: &[i16]) -> Result<Tensor, Refusal> {
        let mut bytes = Vec::new();
        for row in 0..self.n {
            for start in (0..self.k).step_by(STORED) {
                let scale = f16_of(self.scales[row * self.blocks() + start / self.block]);
                bytes.extend_from_slice(&scale.to_le_bytes());
                let codes = &centred[row * self.k + start..][..STORED];
                match dtype {
                    DType::Q4_0 => {
                        let code = |i: usize| (codes[i] + 8) as u8;
                        bytes.extend((0..STORED / 2).map(|i| code(i) | code(i + STORED / 2) << 4));
                    }
                    _ => bytes.extend(codes.iter().map(|&code| code as i8 as u8)),
                }
            }
        }
        Ok(Tensor::from_bytes(&[self.n, self.k], dtype, &bytes)?)
    }
}

/// Weights stay in their blocks where the node lets rows be quantised too, else they are widened to F32 once.
pub(super) fn matmul_n_bits(l: &mut Lowering<'_>) -> Result<Vec<ValueId>, Refusal> {
    let weight = Blocks::read(l)?;
    let dtype = l.dtype(0)?;
    let x = l.value(0)?;
    let x = l.cast(x, DType::F32)?;
    let dims = [weight.n, weight.k];
    let packs = l.node.int("accuracy_level", 0)? == INT8 && l.is_weight(1) && l.is_weight(2);
    let stored = if packs { weight.stored_as()? } else { None };
    let w = match stored {
        Some((blocks, codes)) => {
            let shape = Shape::new(&dims, blocks);
            l.derived_weight(1, "blocks", shape, || weight.stored(blocks, &codes))?
        }
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

    /// The product with these codes and scales, zero points and groups if any, one node.
    fn product(
        (bits, level): (usize, i64),
        codes: &[u8],
        scales: &[f32],
        (zeros, groups): (&[u8], &[i32]),
        x: &[f32],
    ) -> Vec<f64> {
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
            input: ["x", "codes", "scales", if zeros.is_empty() { "" } else { "zeros" }]
                .into_iter()
                .chain((!groups.is_empty()).then_some("groups"))
                .map(str::to_owned)
                .collect(),
            output: vec!["y".into()],
            attribute,
            ..NodeProto::default()
        };
        let blocks = (K / BLOCK) as i64;
        let dims = [N as i64, blocks, (BLOCK * bits / 8) as i64];
        let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let group_bytes: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
        let graph = GraphProto {
            name: "g".into(),
            node: vec![node],
            initializer: vec![
                initialiser("codes", &dims, 2, codes),
                initialiser("scales", &[N as i64 * blocks], 1, &scale_bytes),
                initialiser("zeros", &[zeros.len() as i64], 2, zeros),
                initialiser("groups", &[groups.len() as i64], 6, &group_bytes),
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
        for (bits, centred) in [(4, false), (8, false), (2, false), (2, true), (4, true), (8, true)] {
            let codes: Vec<u8> =
                numbers(1, N * K * bits / 8).iter().map(|v| (v * 127.0 + 128.0) as u8).collect();
            let scales: Vec<f32> = numbers(2, N * K / BLOCK).iter().map(|v| 0.02 + v.abs() * 0.01).collect();
            let blocks = K / BLOCK;
            // One byte holds the zero points of a row; those of eight bits are near the middle, so that the differences stay in eight bits.
            let zeros: Vec<u8> = match (centred, bits) {
                (false, _) => Vec::new(),
                (true, 8) => vec![128; N * blocks],
                (true, _) => numbers(4, N).iter().map(|v| (v * 127.0 + 128.0) as u8).collect(),
            };
            let x = numbers(3, ROWS * K);
            let run = |level: i64| product((bits, level), &codes, &scales, (&zeros, &[]), &x);
            let (wide, packed) = (run(0), run(4));
            assert_ne!(wide, packed, "{bits} bits: nothing was quantised");
            let part = |bytes: &[u8], at: usize| {
                bytes[at * bits / 8] >> (at * bits % 8) & ((1u32 << bits) - 1) as u8
            };
            let zero = |n: usize, block: usize| match (centred, bits) {
                (false, _) => 1u8 << (bits - 1),
                (true, 8) => 128,
                (true, _) => part(&zeros[n..=n], block),
            };
            let weight = |n: usize, i: usize| {
                let code = i32::from(part(&codes, n * K + i)) - i32::from(zero(n, i / BLOCK));
                f64::from(code) * f64::from(scales[n * blocks + i / BLOCK])
            };
            for row in 0..ROWS {
                for n in 0..N {
                    let (mut exact, mut bound) = (0.0, 1e-6);
                    for i in 0..K {
                        let cell = &x[row * K + i / 32 * 32..][..32];
                        let most = cell.iter().fold(0f32, |a, b| a.max(b.abs()));
                        let (v, w) = (f64::from(x[row * K + i]), weight(n, i));
                        exact += v * w;
                        // Half a step of a row's cell, half a unit in the last place of an F16 scale, and the sum's own rounding.
                        bound += w.abs() * (f64::from(most) / 254.0 + v.abs() * (0.5 / 1024.0 + 1e-5));
                    }
                    let at = row * N + n;
                    let told = format!("{bits} bits, zero points {centred}: {exact}");
                    assert!((wide[at] - exact).abs() <= 1e-4, "{told} {}", wide[at]);
                    assert!((packed[at] - exact).abs() <= bound, "{told} {} {bound}", packed[at]);
                }
            }
        }
    }

    #[test]
    fn an_input_has_the_scale_of_its_group() {
        let codes: Vec<u8> = numbers(1, N * K / 2).iter().map(|v| (v * 127.0 + 128.0) as u8).collect();
        let scales: Vec<f32> = numbers(2, N * K / BLOCK).iter().map(|v| 0.02 + v.abs() * 0.01).collect();
        let groups: Vec<i32> = (0..K as i32).map(|i| i % 2).collect();
        let x = numbers(3, ROWS * K);
        let found = product((4, 4), &codes, &scales, (&[], &groups), &x);
        for (at, found) in found.iter().enumerate() {
            let (row, n) = (at / N, at % N);
            let weight = |i: usize| {
                let code = codes[(n * K + i) / 2] >> (i % 2 * 4) & 15;
                (f64::from(code) - 8.0) * f64::from(scales[n * (K / BLOCK) + groups[i] as usize])
            };
            let exact: f64 = (0..K).map(|i| weight(i) * f64::from(x[row * K + i])).sum();
            assert!((found - exact).abs() <= 1e-4, "{found} {exact}");
        }
    }
}
