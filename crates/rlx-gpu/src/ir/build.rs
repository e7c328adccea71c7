//! Writing kernels.

use super::gemm::Gemm;
use super::{
    Access, Arg, ArgDef, BinaryFn, Binding, Carried, Element, Inst, Kernel, Literal, Loop, Pairs, Stmt,
    Storage, Tile, TileId, Type, UnaryFn, Value, View, ViewId,
};

/// A kernel being written. Statements go to the innermost open loop.
#[derive(Debug)]
pub struct Builder {
    kernel: Kernel,
    open: Vec<Vec<Stmt>>,
}

impl Builder {
    /// An empty kernel.
    pub fn new(name: impl Into<String>, lanes: u32) -> Self {
        let (args, views, tiles) = (Vec::new(), Vec::new(), Vec::new());
        let (types, body) = (Vec::new(), Vec::new());
        let kernel = Kernel { name: name.into(), lanes, args, views, tiles, types, body, gemm: None };
        Self { kernel, open: vec![Vec::new()] }
    }

    /// The finished kernel.
    pub fn finish(mut self) -> Kernel {
        self.kernel.body = self.open.pop().unwrap_or_default();
        self.kernel
    }

    /// A library may compute the kernel, which is this product.
    pub fn stands_for(&mut self, gemm: Gemm) {
        self.kernel.gemm = Some(gemm);
    }

    /// Lanes of a program.
    pub fn lanes(&self) -> u32 {
        self.kernel.lanes
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> Type {
        self.kernel.ty(value)
    }

    fn def(&mut self, def: ArgDef) -> Arg {
        let at = self.kernel.args.iter().position(|known| *known == def);
        let at = at.unwrap_or_else(|| {
            self.kernel.args.push(def);
            self.kernel.args.len() - 1
        });
        Arg(at as u32)
    }

    /// The host's size of a position.
    pub fn size(&mut self, position: u32) -> Arg {
        self.def(ArgDef::Size(position))
    }

    /// A number as argument.
    pub fn known(&mut self, value: i32) -> Arg {
        self.def(ArgDef::Known(value))
    }

    /// Arguments multiplied.
    pub fn product(&mut self, parts: &[Arg]) -> Arg {
        match parts {
            [one] => *one,
            several => self.def(ArgDef::Product(several.to_vec())),
        }
    }

    /// A view whose base and strides are arguments of their own.
    pub fn view(&mut self, binding: Binding, storage: Storage, access: Access, extents: &[Arg]) -> ViewId {
        let id = ViewId(self.kernel.views.len() as u32);
        let base = self.def(ArgDef::Base(id));
        let strides = (0..extents.len()).map(|axis| self.def(ArgDef::Stride(id, axis as u32))).collect();
        let extents = extents.to_vec();
        self.kernel.views.push(View { binding, storage, access, base, extents, strides, wide: 1 });
        id
    }

    /// A view may be loaded from in so many elements at once.
    pub fn widen(&mut self, view: ViewId, wide: u32) {
        self.kernel.views[view.0 as usize].wide = wide;
    }

    /// How many elements a view may be loaded from at once.
    pub fn width(&self, view: ViewId) -> u32 {
        self.kernel.views[view.0 as usize].wide
    }

    /// A tile of so many words.
    pub fn tile(&mut self, element: Element, words: u32) -> TileId {
        self.kernel.tiles.push(Tile { element, words });
        TileId(self.kernel.tiles.len() as u32 - 1)
    }

    /// A view's element.
    pub fn view_element(&self, view: ViewId) -> Element {
        self.kernel.views[view.0 as usize].storage.element()
    }

    fn value(&mut self, element: Element, uniform: bool, staged: bool) -> Value {
        self.kernel.types.push(Type { element, uniform, staged });
        Value(self.kernel.types.len() as u32 - 1)
    }

    fn push(&mut self, results: Vec<Value>, inst: Inst) {
        if let Some(block) = self.open.last_mut() {
            block.push(Stmt { results, inst });
        }
    }

    fn emit(&mut self, element: Element, uniform: bool, inst: Inst) -> Value {
        let value = self.value(element, uniform, false);
        self.push(vec![value], inst);
        value
    }

    /// A float.
    pub fn float(&mut self, value: f64) -> Value {
        self.emit(Element::F32, true, Inst::Const(Literal::F32((value as f32).to_bits())))
    }

    /// An integer.
    pub fn int(&mut self, value: i32) -> Value {
        self.emit(Element::I32, true, Inst::Const(Literal::I32(value)))
    }

    /// A truth value.
    pub fn truth(&mut self, value: bool) -> Value {
        self.emit(Element::Bool, true, Inst::Const(Literal::Bool(value)))
    }

    /// The value of an argument.
    pub fn arg(&mut self, arg: Arg) -> Value {
        self.emit(Element::I32, true, Inst::Arg(arg))
    }

    /// The number of the program.
    pub fn program(&mut self) -> Value {
        self.emit(Element::I32, true, Inst::Program)
    }

    /// The number of the lane.
    pub fn lane(&mut self) -> Value {
        self.emit(Element::I32, false, Inst::Lane)
    }

    /// A function of one value.
    pub fn unary(&mut self, function: UnaryFn, x: Value) -> Value {
        let ty = self.ty(x);
        let element = match function {
            UnaryFn::IsNan | UnaryFn::Not => Element::Bool,
            UnaryFn::ToFloat | UnaryFn::FromBits | UnaryFn::LowHalf | UnaryFn::HighHalf => Element::F32,
            UnaryFn::ToInt | UnaryFn::Bits => Element::I32,
            _ => ty.element,
        };
        self.emit(element, ty.uniform, Inst::Unary(function, x))
    }

    /// A function of two values.
    pub fn binary(&mut self, function: BinaryFn, a: Value, b: Value) -> Value {
        let (x, y) = (self.ty(a), self.ty(b));
        let element = match function {
            BinaryFn::PackHalves | BinaryFn::PackBrains => Element::I32,
            _ if function.compares() => Element::Bool,
            _ => x.element,
        };
        self.emit(element, x.uniform && y.uniform, Inst::Binary(function, a, b))
    }

    /// `a + b`
    pub fn add(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::Add, a, b)
    }

    /// `a - b`
    pub fn sub(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::Sub, a, b)
    }

    /// `a * b`
    pub fn mul(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::Mul, a, b)
    }

    /// `a / b`
    pub fn div(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::Div, a, b)
    }

    /// `a && b`
    pub fn and(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::And, a, b)
    }

    /// `a < b`
    pub fn less(&mut self, a: Value, b: Value) -> Value {
        self.binary(BinaryFn::Less, a, b)
    }

    /// A value at least 0 divided by a power of two, and the rest.
    pub fn halves(&mut self, a: Value, by: u32) -> (Value, Value) {
        let (bits, low) = (self.int(by.trailing_zeros() as i32), self.int(by as i32 - 1));
        (self.binary(BinaryFn::ShiftRight, a, bits), self.binary(BinaryFn::And, a, low))
    }

    /// `0 <= a && a < extent`
    pub fn within(&mut self, a: Value, extent: Arg) -> Value {
        let (zero, extent) = (self.int(0), self.arg(extent));
        let above = self.binary(BinaryFn::LessEqual, zero, a);
        let below = self.less(a, extent);
        self.and(above, below)
    }

    /// `condition ? a : b`
    pub fn select(&mut self, condition: Value, a: Value, b: Value) -> Value {
        let types = [condition, a, b].map(|v| self.ty(v).uniform);
        let element = self.ty(a).element;
        self.emit(element, types == [true; 3], Inst::Select(condition, a, b))
    }

    /// The coordinates of a linear index.
    pub fn digits(&mut self, linear: Value, extents: &[Arg]) -> Vec<Value> {
        let uniform = self.ty(linear).uniform;
        let digit = |axis| Inst::Digit { linear, extents: extents.to_vec(), axis };
        (0..extents.len() as u32).map(|axis| self.emit(Element::I32, uniform, digit(axis))).collect()
    }

    /// The element at coordinates.
    pub fn load(&mut self, view: ViewId, at: &[Value], mask: Option<Value>) -> Value {
        let element = self.view_element(view);
        self.emit(element, false, Inst::Load { view, at: at.to_vec(), mask })
    }

    /// So many elements from a coordinate on: no more than the view may be loaded from at once.
    pub fn load_wide(&mut self, view: ViewId, at: &[Value], count: u32, mask: Option<Value>) -> Vec<Value> {
        let element = self.view_element(view);
        let values: Vec<Value> = (0..count).map(|_| self.value(element, false, false)).collect();
        self.push(values.clone(), Inst::Load { view, at: at.to_vec(), mask });
        values
    }

    /// Writes consecutive words of a tile.
    pub fn put(&mut self, tile: TileId, at: Value, values: &[Value]) {
        self.push(Vec::new(), Inst::Put { tile, at, values: values.to_vec() });
    }

    /// So many consecutive words of a tile.
    pub fn take(&mut self, tile: TileId, at: Value, count: u32) -> Vec<Value> {
        let element = self.kernel.tiles[tile.0 as usize].element;
        let values: Vec<Value> = (0..count).map(|_| self.value(element, false, false)).collect();
        self.push(values.clone(), Inst::Take { tile, at });
        values
    }

    /// 16 lines of 8 words, shared out among a warp; see [`Inst::Fragment`].
    pub fn fragment(&mut self, tile: TileId, at: Value, pitch: u32, lines: u32) -> [Value; 4] {
        let results = [(); 4].map(|()| self.value(Element::I32, false, false));
        self.push(results.to_vec(), Inst::Fragment { tile, at, pitch, lines });
        results
    }

    /// Products of 16 rows and 8 columns added to a warp's sums; see [`Inst::Mma`].
    pub fn mma(
        &mut self,
        pairs: Pairs,
        rows: [Value; 4],
        columns: [Value; 2],
        sums: [Value; 4],
    ) -> [Value; 4] {
        let results = sums.map(|_| self.value(Element::F32, false, false));
        self.push(results.to_vec(), Inst::Mma { pairs, rows, columns, sums });
        results
    }

    /// Products of 16 rows and 8 columns of bytes added to a warp's sums; see [`Inst::MmaBytes`].
    pub fn mma_bytes(&mut self, rows: &[Value], columns: &[Value], sums: [Value; 4]) -> [Value; 4] {
        let results = sums.map(|_| self.value(Element::I32, false, false));
        let (rows, columns) = (rows.to_vec(), columns.to_vec());
        self.push(results.to_vec(), Inst::MmaBytes { rows, columns, sums });
        results
    }

    /// Lanes wait for each other.
    pub fn barrier(&mut self) {
        self.push(Vec::new(), Inst::Barrier);
    }

    /// `a * b + c`
    pub fn fma(&mut self, a: Value, b: Value, c: Value) -> Value {
        let uniform = [a, b, c].map(|v| self.ty(v).uniform) == [true; 3];
        self.emit(Element::F32, uniform, Inst::Fma(a, b, c))
    }

    /// `c` and the products of four signed bytes.
    pub fn dot4(&mut self, a: Value, b: Value, c: Value) -> Value {
        let uniform = [a, b, c].map(|v| self.ty(v).uniform) == [true; 3];
        self.emit(Element::I32, uniform, Inst::Dot4(a, b, c))
    }

    /// The entries of a table that the bytes of a word name.
    pub fn lookup(&mut self, x: Value, table: [i8; 16]) -> Value {
        let uniform = self.ty(x).uniform;
        self.emit(Element::I32, uniform, Inst::Lookup(x, table))
    }

    /// Writes the element at coordinates.
    pub fn store(&mut self, view: ViewId, at: &[Value], value: Value, mask: Option<Value>) {
        self.push(Vec::new(), Inst::Store { view, at: at.to_vec(), value, mask });
    }

    /// A value combined over all lanes.
    pub fn fold(&mut self, function: BinaryFn, x: Value) -> Value {
        let element = self.ty(x).element;
        self.emit(element, true, Inst::Fold(function, x))
    }

    /// A value that all lanes can see.
    pub fn stage(&mut self, x: Value) -> Value {
        let element = self.ty(x).element;
        let value = self.value(element, false, true);
        self.push(vec![value], Inst::Stage(x));
        value
    }

    /// What a lane gave to a stage.
    pub fn peek(&mut self, tile: Value, at: Value) -> Value {
        let element = self.ty(tile).element;
        self.emit(element, false, Inst::Peek { tile, at })
    }

    /// Sets the word `slot` where `holds` is false and `mask` true.
    pub fn check(&mut self, holds: Value, mask: Value, slot: Arg) {
        self.push(Vec::new(), Inst::Check { holds, mask, slot });
    }

    /// Begins a loop that carries values of lanes: its index, and what it carries within a turn.
    pub fn open_loop(&mut self, firsts: &[Value]) -> (Value, Vec<Value>) {
        let index = self.value(Element::I32, true, false);
        let params = firsts.iter().map(|&v| self.value(self.ty(v).element, false, false)).collect();
        self.open.push(Vec::new());
        (index, params)
    }

    /// Ends the loop begun last, which runs from the first bound below the second; what it carries after the last turn.
    pub fn close_loop(
        &mut self,
        [from, to]: [Value; 2],
        step: u32,
        index: Value,
        firsts: &[Value],
        params: &[Value],
        next: &[Value],
    ) -> Vec<Value> {
        let body = self.open.pop().unwrap_or_default();
        let results: Vec<Value> =
            firsts.iter().map(|&v| self.value(self.ty(v).element, false, false)).collect();
        let carried = firsts.iter().zip(params).zip(next);
        let carried = carried.map(|((&first, &param), &next)| Carried { first, param, next }).collect();
        let turn = Loop { from, to, step, index, carried, body };
        self.push(results.clone(), Inst::Loop(Box::new(turn)));
        results
    }
}
