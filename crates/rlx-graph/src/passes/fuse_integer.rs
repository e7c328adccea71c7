//! Products of numbers that come from codes of eight bits become products of the codes.
//!
//! Needs: scales and zero points of values are constants. Does: `(x - zero) * scale` multiplied with a weight of the same form becomes a sum of whole
//! numbers with one scale, which takes the bias behind it and, if its result becomes codes again, that step. Codes that become numbers, are
//! moved and become the same codes are moved as codes. Leaves: groups of channels, values whose
//! codes have a scale each, and products that the target does not run on codes.
//!
//! Sums of codes are exact; scales are multiplied with each other before they meet the sum. So a result differs from that of the graph
//! before by roundings of F32, and codes made of it by one where such a rounding decides.

use crate::eval::from_f64;
use crate::ids::{NodeId, ValueId};
use crate::integer::{code_range, is_code};
use crate::op::OpDef;
use crate::ops::Op;
use crate::ops::activation::{Activation, ActivationKind};
use crate::ops::binary::{Binary, BinaryOp};
use crate::ops::cast::Cast;
use crate::ops::conv::Conv;
use crate::ops::integer_conv::IntegerConv;
use crate::ops::integer_linear::IntegerLinear;
use crate::ops::matmul::MatMul;
use crate::ops::pool_window::{PoolWindow, WindowPool};
use crate::ops::reshape::Reshape;
use crate::ops::transpose::Transpose;
use crate::ops::unary::{Unary, UnaryOp};
use crate::passes::{PassCx, PassError, Target};
use crate::rewrite::driver::apply;
use crate::rewrite::{Draft, Operand, Patch};
use crate::window::Layout;
use rlx_tensor::{DType, Dim, Shape, Tensor};

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    let mut order: std::collections::VecDeque<NodeId> = draft.schedule()?.into();
    while let Some(id) = order.pop_front() {
        if !draft.is_live(id) {
            continue;
        }
        let Some((rule, patch)) = (Search { draft, id, target: cx.target }).patch() else { continue };
        if let Some(touched) = apply(draft, rule, id, &patch, cx.trace) {
            order.extend(touched.into_iter().filter(|&next| draft.is_live(next)));
        }
    }
    Ok(())
}

/// Numbers that are codes less a zero point, times a scale.
struct Coded {
    codes: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
}

/// A product of codes.
#[derive(Clone)]
enum Product {
    Linear(IntegerLinear),
    Conv(IntegerConv),
}

/// What surrounds the sums of both.
struct Surroundings<'p> {
    bias: &'p mut bool,
    to: &'p mut DType,
    codes: [&'p mut i64; 3],
}

impl Product {
    fn surroundings(&mut self) -> Surroundings<'_> {
        match self {
            Product::Linear(op) => Surroundings {
                bias: &mut op.bias,
                to: &mut op.to,
                codes: [&mut op.zero, &mut op.low, &mut op.high],
            },
            Product::Conv(op) => Surroundings {
                bias: &mut op.bias,
                to: &mut op.to,
                codes: [&mut op.zero, &mut op.low, &mut op.high],
            },
        }
    }

    fn def(&self) -> &dyn OpDef {
        match self {
            Product::Linear(op) => op,
            Product::Conv(op) => op,
        }
    }

    fn op(&self) -> Op {
        match self {
            Product::Linear(op) => op.clone().into(),
            Product::Conv(op) => op.clone().into(),
        }
    }
}

/// The shape of images whose channels are moved to the end.
fn channels_last(shape: &Shape) -> Shape {
    let perm = Layout { channels_last: true }.permutation(shape.rank(), false);
    let dims = perm.iter().map(|&axis| shape.dims()[axis].clone()).collect();
    Shape::from_dims(dims, shape.dtype())
}

/// One node that may end a pattern.
struct Search<'d> {
    draft: &'d Draft,
    id: NodeId,
    target: &'d dyn Target,
}

impl<'d> Search<'d> {
    fn patch(&self) -> Option<(&'static str, Patch)> {
        let op = self.draft.node(self.id).op();
        if let Some(conv) = op.downcast::<Conv>() {
            return self.conv(conv).map(|patch| ("integer_conv", patch));
        }
        if let Some(product) = op.downcast::<MatMul>() {
            return self.linear(product).map(|patch| ("integer_linear", patch));
        }
        if let Some(binary) = op.downcast::<Binary>() {
            let scaled = || self.scaled().map(|patch| ("integer_scale", patch));
            let biased = || self.biased().map(|patch| ("integer_bias", patch));
            return match binary.kind {
                BinaryOp::Mul => scaled(),
                BinaryOp::Add => biased(),
                _ => None,
            };
        }
        let cast = op.downcast::<Cast>().filter(|cast| is_code(cast.to))?;
        let moved = self.moved(cast.to).map(|patch| ("integer_moved", patch));
        moved.or_else(|| self.quantised(cast.to).map(|patch| ("integer_codes", patch)))
    }

    fn inputs(&self) -> &'d [ValueId] {
        self.draft.node(self.id).inputs()
    }

    fn result(&self) -> ValueId {
        self.draft.node(self.id).outputs()[0]
    }

    fn dtype(&self, value: ValueId) -> DType {
        self.draft.shape(value).dtype()
    }

    /// The operands of a value that only one node uses, if it is made by this function of two.
    fn binary(&self, value: ValueId, kind: BinaryOp) -> Option<[ValueId; 2]> {
        let (op, node) = self.draft.made_by::<Binary>(value).filter(|(op, _)| op.kind == kind)?;
        debug_assert_eq!(op.kind, kind);
        node.inputs().try_into().ok()
    }

    /// The same with a number, in either order where that is the same.
    fn with_number(&self, value: ValueId, kind: BinaryOp) -> Option<(ValueId, f64)> {
        let [a, b] = self.binary(value, kind)?;
        if let Some(number) = self.draft.as_scalar(b) {
            return Some((a, number));
        }
        let turned = matches!(kind, BinaryOp::Add | BinaryOp::Mul | BinaryOp::Max | BinaryOp::Min);
        self.draft.as_scalar(a).filter(|_| turned).map(|number| (b, number))
    }

    fn cast_from_codes(&self, value: ValueId) -> Option<ValueId> {
        let (cast, node) = self.draft.made_by::<Cast>(value)?;
        let from = node.inputs()[0];
        (cast.to == DType::F32 && is_code(self.dtype(from))).then_some(from)
    }

    /// The codes that numbers come from.
    fn coded(&self, value: ValueId) -> Option<Coded> {
        let [a, b] = self.binary(value, BinaryOp::Mul)?;
        let known = |v: ValueId| self.draft.as_const(v).is_some() || self.draft.is_weight(v);
        for (centred, scale) in [(a, b), (b, a)] {
            if !known(scale) || self.dtype(scale) != DType::F32 {
                continue;
            }
            if let Some(codes) = self.cast_from_codes(centred) {
                return Some(Coded { codes, scale, zero: None });
            }
            if let Some([wide, zero]) = self.binary(centred, BinaryOp::Sub)
                && let Some(codes) = self.cast_from_codes(wide)
                && self.draft.as_const(zero).is_some()
            {
                return Some(Coded { codes, scale, zero: Some(zero) });
            }
        }
        None
    }

    /// The same of a value of a run: one scale and one zero point, as a constant of the codes' dtype.
    fn coded_value(&self, value: ValueId) -> Option<(ValueId, f32, Tensor)> {
        let coded = self.coded(value)?;
        let scale = self.draft.as_scalar(coded.scale)? as f32;
        let zero = match coded.zero {
            Some(zero) => self.draft.as_scalar(zero)?,
            None => 0.0,
        };
        let dtype = self.dtype(coded.codes);
        let (low, high) = code_range(dtype)?;
        let fits = (low as f64..=high as f64).contains(&zero) && zero.fract() == 0.0;
        let same = self.draft.shape(coded.codes).dims() == self.draft.shape(value).dims();
        (fits && same).then_some(())?;
        Some((coded.codes, scale, from_f64(&[], dtype, &[zero]).ok()?))
    }

    /// The numbers of a constant that has one, or one for each index of an axis of a weight.
    fn along(&self, value: ValueId, axis: usize, dims: &[Dim]) -> Option<Vec<f64>> {
        let tensor = self.draft.as_const(value)?;
        let values = crate::eval::to_f64(tensor).ok()?;
        let missing = dims.len().checked_sub(tensor.dims().len())?;
        let own = |(at, &extent): (usize, &usize)| extent == 1 || missing + at == axis;
        let fits =
            values.len() == 1 || (tensor.dims().iter().enumerate().all(own) && dims[axis] == values.len());
        fits.then_some(values)
    }

    /// Weights as codes: their value, the scales multiplied with x's, and zero points unless all are zero.
    fn weight(
        &self,
        value: ValueId,
        outputs: usize,
        x_scale: f32,
    ) -> Option<(ValueId, Tensor, Option<Tensor>)> {
        let coded = self.coded(value)?;
        let shape = self.draft.shape(coded.codes);
        let whole = self.draft.is_weight(coded.codes) && shape.dims() == self.draft.shape(value).dims();
        let scales = self.along(coded.scale, outputs, shape.dims()).filter(|_| whole)?;
        let scales: Vec<f32> = scales.iter().map(|&s| s as f32 * x_scale).collect();
        let zeros = match coded.zero {
            Some(zero) => self.along(zero, outputs, shape.dims())?,
            None => vec![0.0],
        };
        let zeros = match zeros.iter().all(|&z| z == 0.0) {
            true => None,
            false => Some(from_f64(&[zeros.len()], shape.dtype(), &zeros).ok()?),
        };
        Some((coded.codes, Tensor::from_slice(&[scales.len()], &scales).ok()?, zeros))
    }

    /// The product of codes that a node is, with what stands behind its sums.
    fn product(
        &self,
        mut product: Product,
        [x, w]: [ValueId; 2],
        outputs: usize,
        bias: Option<ValueId>,
    ) -> Option<Patch> {
        let (x, x_scale, x_zero) = self.coded_value(x)?;
        let (w, scale, zeros) = self.weight(w, outputs, x_scale)?;
        match &mut product {
            Product::Linear(op) => op.weight_zeros = zeros.is_some(),
            Product::Conv(op) => op.weight_zeros = zeros.is_some(),
        }
        let around = product.surroundings();
        (*around.bias, *around.to) = (bias.is_some(), DType::F32);
        let mut patch = Patch::new();
        let mut operands: Vec<Operand> = vec![x.into(), w.into(), patch.constant(x_zero.clone())];
        let mut shapes = vec![self.draft.shape(x).clone(), self.draft.shape(w).clone()];
        shapes.push(Shape::scalar(x_zero.dtype()));
        for tensor in zeros.into_iter().chain([scale]) {
            shapes.push(Shape::new(tensor.dims(), tensor.dtype()));
            operands.push(patch.constant(tensor));
        }
        if let Some(bias) = bias {
            shapes.push(self.draft.shape(bias).clone());
            operands.push(bias.into());
        }
        self.runs(&product, shapes, self.draft.shape(self.result())).then_some(())?;
        let y = patch.add(product.op(), &operands);
        patch.replace(self.result(), y);
        Some(patch)
    }

    /// Whether the target runs a product on codes: a convolution with channels last, as it will stand.
    fn runs(&self, product: &Product, mut shapes: Vec<Shape>, result: &Shape) -> bool {
        let (mut product, mut result) = (product.clone(), result.clone());
        if let Product::Conv(op) = &mut product
            && !op.channels_last
        {
            op.channels_last = true;
            (shapes[0], result) = (channels_last(&shapes[0]), channels_last(&result));
        }
        self.target.runs(product.def(), &shapes.iter().collect::<Vec<_>>(), &[&result])
    }

    fn conv(&self, conv: &Conv) -> Option<Patch> {
        let plain = conv.groups == 1 && !conv.addend && conv.activation == ActivationKind::Identity;
        let bias = conv.bias.then(|| self.inputs()[2]);
        let product = Product::Conv(IntegerConv::sums(conv));
        plain.then(|| self.product(product, [self.inputs()[0], self.inputs()[1]], 0, bias))?
    }

    fn linear(&self, product: &MatMul) -> Option<Patch> {
        let &[x, w] = self.inputs() else { return None };
        let matrix = self.draft.shape(w).rank() == 2 && !product.transpose_a;
        let transposed = !product.transpose_b;
        let op = Product::Linear(IntegerLinear { transposed, ..IntegerLinear::sums() });
        matrix.then(|| self.product(op, [x, w], usize::from(transposed), None))?
    }

    /// A product of codes that only one node uses.
    fn inner(&self, value: ValueId) -> Option<(Product, &'d [ValueId])> {
        if self.draft.use_count(value) != 1 {
            return None;
        }
        if let Some((op, node)) = self.draft.made_by::<IntegerLinear>(value) {
            return Some((Product::Linear(op.clone()), node.inputs()));
        }
        let (op, node) = self.draft.made_by::<IntegerConv>(value)?;
        Some((Product::Conv(op.clone()), node.inputs()))
    }

    /// The product with other surroundings and, at a position, one more operand.
    fn around(
        &self,
        product: &Product,
        inputs: &[ValueId],
        more: (usize, Operand, Shape),
        mut patch: Patch,
    ) -> Option<Patch> {
        let (at, operand, shape) = more;
        let mut shapes: Vec<Shape> = inputs.iter().map(|&v| self.draft.shape(v).clone()).collect();
        let mut operands: Vec<Operand> = inputs.iter().map(|&v| v.into()).collect();
        shapes.insert(at, shape);
        operands.insert(at, operand);
        self.runs(product, shapes, self.draft.shape(self.result())).then_some(())?;
        let y = patch.add(product.op(), &operands);
        patch.replace(self.result(), y);
        Some(patch)
    }

    /// A value as numbers of the result's outputs, or a single one.
    fn of_outputs(&self, product: &Product, value: ValueId, patch: &mut Patch) -> Option<(Operand, Shape)> {
        let (shape, result) = (self.draft.shape(value), self.draft.shape(self.result()));
        let axis = match product {
            Product::Linear(_) => result.rank() - 1,
            Product::Conv(op) => Layout { channels_last: op.channels_last }.channels(result.rank()),
        };
        let missing = result.rank().checked_sub(shape.rank())?;
        let at = axis.checked_sub(missing);
        let fits = |(i, d): (usize, &Dim)| *d == 1 || (Some(i) == at && *d == result.dims()[axis]);
        let all = shape.dtype() == DType::F32 && shape.dims().iter().enumerate().all(fits);
        let count = at.map_or(Dim::Known(1), |at| shape.dims()[at].clone());
        let row = Shape::from_dims(vec![count.clone()], DType::F32);
        Some(match (all.then_some(())?, shape.rank()) {
            ((), 1) => (value.into(), row),
            ((), _) => (patch.add(Reshape { dims: vec![count] }, &[value.into()]), row),
        })
    }

    /// Whether a value is a weight, under whatever dims.
    fn is_weight(&self, value: ValueId) -> bool {
        let reshaped = self.draft.made_by::<Reshape>(value).map(|(_, node)| node.inputs()[0]);
        self.draft.is_weight(reshaped.unwrap_or(value))
    }

    /// Sums as F32 with a scale.
    fn scaled(&self) -> Option<Patch> {
        let &[a, b] = self.inputs() else { return None };
        for (sums, scale) in [(a, b), (b, a)] {
            let Some((cast, node)) = self.draft.made_by::<Cast>(sums) else { continue };
            let once = cast.to == DType::F32 && self.draft.use_count(sums) == 1;
            let Some((mut product, inputs)) = self.inner(node.inputs()[0]).filter(|_| once) else { continue };
            let around = product.surroundings();
            if *around.to != DType::I32 {
                continue;
            }
            *around.to = DType::F32;
            let biased = *around.bias;
            let mut patch = Patch::new();
            let (operand, shape) = self.of_outputs(&product, scale, &mut patch)?;
            let at = inputs.len() - usize::from(biased);
            return self.around(&product, inputs, (at, operand, shape), patch);
        }
        None
    }

    /// Numbers of the outputs that are added become the bias.
    fn biased(&self) -> Option<Patch> {
        let &[a, b] = self.inputs() else { return None };
        for (sums, bias) in [(a, b), (b, a)] {
            let Some((mut product, inputs)) = self.inner(sums) else { continue };
            let around = product.surroundings();
            if *around.to != DType::F32 || *around.bias || !self.is_weight(bias) {
                continue;
            }
            *around.bias = true;
            if self.draft.shape(sums).dims() != self.draft.shape(self.result()).dims() {
                continue;
            }
            let mut patch = Patch::new();
            let (operand, shape) = self.of_outputs(&product, bias, &mut patch)?;
            return self.around(&product, inputs, (inputs.len(), operand, shape), patch);
        }
        None
    }

    /// What becomes codes as `round(x / scale) + zero` between the ends of the dtype, with scale and zero point.
    fn stepped(&self, dtype: DType) -> Option<(ValueId, f32, i64)> {
        let (low, high) = code_range(dtype)?;
        let (inside, top) = self.with_number(self.inputs()[0], BinaryOp::Min)?;
        let (mut code, bottom) = self.with_number(inside, BinaryOp::Max)?;
        ((bottom, top) == (low as f64, high as f64)).then_some(())?;
        let mut zero = 0.0;
        if let Some((rounded, number)) = self.with_number(code, BinaryOp::Add) {
            (code, zero) = (rounded, number);
        }
        let (_, node) = self.draft.made_by::<Unary>(code).filter(|(op, _)| op.kind == UnaryOp::Round)?;
        let divided = node.inputs()[0];
        let (value, scale) = match self.with_number(divided, BinaryOp::Div) {
            Some((value, scale)) => (value, scale as f32),
            // A division by a power of two is written as a product.
            None => self
                .with_number(divided, BinaryOp::Mul)
                .map(|(value, factor)| (value, 1.0 / factor as f32))?,
        };
        let whole = zero.fract() == 0.0 && (low as f64..=high as f64).contains(&zero) && scale > 0.0;
        whole.then_some((value, scale, zero as i64))
    }

    /// Numbers of codes that become codes of the same scale and zero point, which are the same: each is within half a step of itself.
    fn moved(&self, dtype: DType) -> Option<Patch> {
        let (mut value, scale, zero) = self.stepped(dtype)?;
        let mut moves: Vec<&Op> = Vec::new();
        while let Some(id) = self.draft.producer(value) {
            let node = self.draft.node(id);
            let moves_elements =
                node.op().downcast::<Reshape>().is_some() || node.op().downcast::<Transpose>().is_some();
            if !moves_elements && !self.picks(node.op(), node.inputs()[0], dtype) {
                break;
            }
            moves.push(node.op());
            value = node.inputs()[0];
        }
        let (codes, own_scale, own_zero) = self.coded_value(value)?;
        let same = self.dtype(codes) == dtype && own_scale == scale;
        // Numbers of such scales have all their bits.
        let plain = (1e-30..1e30).contains(&scale);
        (same && plain && crate::eval::to_f64(&own_zero).ok()? == [zero as f64]).then_some(())?;
        let mut patch = Patch::new();
        let mut moved: Operand = codes.into();
        for op in moves.into_iter().rev() {
            moved = patch.add(op.clone(), &[moved]);
        }
        patch.replace(self.result(), moved);
        Some(patch)
    }

    /// Whether an op takes the largest of some elements, none of them only added ones, and does so of codes. Scales keep the order.
    fn picks(&self, op: &Op, x: ValueId, dtype: DType) -> bool {
        let Some(pool) = op.downcast::<PoolWindow>() else { return false };
        let below = |(ends, &size): (&Dim, &usize)| ends.known().is_some_and(|ends| ends < size);
        let inside =
            pool.before.iter().zip(&pool.window).all(below) && pool.after.iter().zip(&pool.window).all(below);
        let plain = pool.kind == WindowPool::Max && !pool.indices && !pool.ceil;
        let last = PoolWindow { channels_last: true, ..pool.clone() };
        let codes = self.draft.shape(x).with_dtype(dtype);
        let moved = if pool.channels_last { codes } else { channels_last(&codes) };
        plain
            && inside
            && pool.dilations.iter().all(|&d| d == 1)
            && self.target.runs(&last, &[&moved], &[&moved])
    }

    /// Sums that become codes.
    fn quantised(&self, dtype: DType) -> Option<Patch> {
        let (low, high) = code_range(dtype)?;
        let (mut value, scale, zero) = self.stepped(dtype)?;
        let (mut least, mut most) = (low, high);
        // What limits numbers limits their codes.
        for _ in 0..3 {
            if self.draft.use_count(value) != 1 {
                break;
            }
            let of = |number: f64| ((number as f32 / scale).round_ties_even() + zero as f32) as i64;
            if let Some((Activation { kind: ActivationKind::Relu }, node)) = self.draft.made_by(value) {
                (value, least) = (node.inputs()[0], least.max(zero));
            } else if let Some((x, number)) = self.with_number(value, BinaryOp::Max) {
                (value, least) = (x, least.max(of(number)));
            } else if let Some((x, number)) = self.with_number(value, BinaryOp::Min) {
                (value, most) = (x, most.min(of(number)));
            } else {
                break;
            }
        }
        let (mut product, inputs) = self.inner(value)?;
        let around = product.surroundings();
        let fits = *around.to == DType::F32 && least <= most;
        let biased = *around.bias;
        *around.to = dtype;
        for (to, number) in around.codes.into_iter().zip([zero, least.min(high), most.max(low)]) {
            *to = number;
        }
        let same = self.draft.shape(value).dims() == self.draft.shape(self.result()).dims();
        (fits && same).then_some(())?;
        let mut patch = Patch::new();
        let step = patch.constant(Tensor::from_slice(&[1], &[scale]).ok()?);
        let at = inputs.len() - usize::from(biased);
        self.around(&product, inputs, (at, step, Shape::new(&[1], DType::F32)), patch)
    }
}

#[cfg(test)]
mod tests {
    use crate::rewrite::testing::{after, fired};

    const WINDOW: &str = "strides=[1], dilations=[1], before=dims[1], after=dims[1], groups=1";

    /// A convolution of codes made numbers whose result becomes codes.
    fn conv(groups: usize) -> String {
        let window = WINDOW.replace("groups=1", &format!("groups={groups}"));
        format!(
            r#"graph "g" {{
  input @x : u8[batch, 2, 5]
  param @w : i8[4, {each}, 3]
  param @b : f32[4]
  const %3 : f32[1, 1, 1] = [130.0]
  const %4 : f32[1, 1, 1] = [0.02]
  const %5 : f32[4, 1, 1] = [0.01, 0.02, 0.03, 0.04]
  const %6 : f32[] = [0.3]
  const %7 : f32[] = [9.0]
  const %8 : f32[] = [0.0]
  const %9 : f32[] = [255.0]
  %10 : f32[batch, 2, 5] = cast(@x) {{to=f32}}
  %11 : f32[batch, 2, 5] = binary(%10, %3) {{kind=sub}}
  %12 : f32[batch, 2, 5] = binary(%11, %4) {{kind=mul}}
  %13 : f32[4, {each}, 3] = cast(@w) {{to=f32}}
  %14 : f32[4, {each}, 3] = binary(%13, %5) {{kind=mul}}
  %15 : f32[batch, 4, 5] = conv(%12, %14, @b) {{{window}, bias=true, addend=false, activation=identity, channels_last=false}}
  %16 : f32[batch, 4, 5] = activation(%15) {{kind=relu}}
  %17 : f32[batch, 4, 5] = binary(%16, %6) {{kind=div}}
  %18 : f32[batch, 4, 5] = unary(%17) {{kind=round}}
  %19 : f32[batch, 4, 5] = binary(%18, %7) {{kind=add}}
  %20 : f32[batch, 4, 5] = binary(%19, %8) {{kind=max}}
  %21 : f32[batch, 4, 5] = binary(%20, %9) {{kind=min}}
  %22 : u8[batch, 4, 5] = cast(%21) {{to=u8}}
  return "y": %22
}}"#,
            each = 2 / groups
        )
    }

    #[test]
    fn a_convolution_between_codes_stays_among_codes() {
        insta::assert_snapshot!(after(&["fuse_integer"], &conv(1)), @r#"
        graph "g" {
          input @x : u8[batch, 2, 5]
          param @w : i8[4, 2, 3]
          param @b : f32[4]
          const %3 : u8[] = [130]
          const %4 : f32[4] = [0.0002, 0.0004, 0.00059999997, 0.0008]
          const %5 : f32[1] = [0.3]
          %6 : u8[batch, 4, 5] = integer_conv(@x, @w, %3, %4, %5, @b) {strides=[1], dilations=[1], before=dims[1], after=dims[1], channels_last=false, weight_zeros=false, bias=true, to=u8, zero=9, low=9, high=255}
          return "y": %6
        }
        "#);
    }

    #[test]
    fn codes_are_moved_as_codes() {
        let turned = |zero: &str| {
            format!(
                r#"graph "g" {{
  input @x : u8[batch, 4]
  const %1 : f32[] = [130.0]
  const %2 : f32[] = [0.3]
  const %3 : f32[] = [0.0]
  const %4 : f32[] = [255.0]
  const %5 : f32[] = [{zero}]
  %6 : f32[batch, 4] = cast(@x) {{to=f32}}
  %7 : f32[batch, 4] = binary(%6, %1) {{kind=sub}}
  %8 : f32[batch, 4] = binary(%7, %2) {{kind=mul}}
  %9 : f32[batch, 2, 2] = reshape(%8) {{dims=dims[batch, 2, 2]}}
  %10 : f32[2, batch, 2] = transpose(%9) {{perm=[1, 0, 2]}}
  %11 : f32[2, batch, 2] = binary(%10, %2) {{kind=div}}
  %12 : f32[2, batch, 2] = unary(%11) {{kind=round}}
  %13 : f32[2, batch, 2] = binary(%12, %5) {{kind=add}}
  %14 : f32[2, batch, 2] = binary(%13, %3) {{kind=max}}
  %15 : f32[2, batch, 2] = binary(%14, %4) {{kind=min}}
  %16 : u8[2, batch, 2] = cast(%15) {{to=u8}}
  return "y": %16
}}"#
            )
        };
        insta::assert_snapshot!(after(&["fuse_integer"], &turned("130.0")), @r#"
        graph "g" {
          input @x : u8[batch, 4]
          %1 : u8[batch, 2, 2] = reshape(@x) {dims=dims[batch, 2, 2]}
          %2 : u8[2, batch, 2] = transpose(%1) {perm=[1, 0, 2]}
          return "y": %2
        }
        "#);
        assert!(fired("fuse_integer", &turned("129.0")).is_empty());
    }

    #[test]
    fn groups_of_channels_stay_numbers() {
        assert!(fired("fuse_integer", &conv(2)).is_empty());
    }

    #[test]
    fn sums_take_scale_and_bias() {
        let before = r#"graph "g" {
  input @x : u8[batch, 4]
  input @zero : u8[]
  input @scale : f32[]
  param @w : i8[4, 3]
  param @b : f32[3]
  %5 : i32[batch, 3] = integer_linear(@x, @w, @zero) {transposed=true, weight_zeros=false, bias=false, to=i32, zero=0, low=0, high=0}
  %6 : f32[batch, 3] = cast(%5) {to=f32}
  %7 : f32[batch, 3] = binary(%6, @scale) {kind=mul}
  %8 : f32[batch, 3] = binary(@b, %7) {kind=add}
  return "y": %8
}"#;
        insta::assert_snapshot!(after(&["fuse_integer"], before), @r#"
        graph "g" {
          input @x : u8[batch, 4]
          input @zero : u8[]
          input @scale : f32[]
          param @w : i8[4, 3]
          param @b : f32[3]
          %5 : f32[1] = reshape(@scale) {dims=dims[1]}
          %6 : f32[batch, 3] = integer_linear(@x, @w, @zero, %5, @b) {transposed=true, weight_zeros=false, bias=true, to=f32, zero=0, low=0, high=0}
          return "y": %6
        }
        "#);
    }

    #[test]
    fn a_product_with_a_weight_of_codes_is_one_of_codes_and_others_are_not() {
        let with = |scale: &str| {
            format!(
                r#"graph "g" {{
  input @x : i8[batch, 4]
  param @w : u8[4, 3]
  input @s : f32[]
  const %3 : f32[] = [0.02]
  const %4 : f32[1, 3] = [1.0, 2.0, 128.0]
  const %5 : f32[] = [0.5]
  %6 : f32[batch, 4] = cast(@x) {{to=f32}}
  %7 : f32[batch, 4] = binary({scale}, %6) {{kind=mul}}
  %8 : f32[4, 3] = cast(@w) {{to=f32}}
  %9 : f32[4, 3] = binary(%8, %4) {{kind=sub}}
  %10 : f32[4, 3] = binary(%9, %5) {{kind=mul}}
  %11 : f32[batch, 3] = matmul(%7, %10) {{transpose_a=false, transpose_b=false}}
  %12 : f32[batch, 3] = binary(%11, @s) {{kind=mul}}
  return "y": %12
}}"#
            )
        };
        insta::assert_snapshot!(after(&["fuse_integer"], &with("%3")), @r#"
        graph "g" {
          input @x : i8[batch, 4]
          param @w : u8[4, 3]
          input @s : f32[]
          const %3 : i8[] = [0]
          const %4 : u8[3] = [1, 2, 128]
          const %5 : f32[1] = [0.01]
          %6 : f32[batch, 3] = integer_linear(@x, @w, %3, %4, %5) {transposed=true, weight_zeros=true, bias=false, to=f32, zero=0, low=0, high=0}
          %7 : f32[batch, 3] = binary(%6, @s) {kind=mul}
          return "y": %7
        }
        "#);
        assert!(fired("fuse_integer", &with("@s")).is_empty());
    }
}
