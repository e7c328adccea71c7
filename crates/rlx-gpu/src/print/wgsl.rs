//! Kernels as WGSL.
//!
//! Truth values are combined by `&` and `|`: `&&` and `||` are branches of the language, and software adapters take minutes to compile hundreds of those in nested loops.
//!
//! Group 0: binding 0 holds the arguments, binding 1 the arena, then come the weights and the states. Every binding is an array of 32-bit words. A kernel that the verifier accepts needs no bounds checks of the compiler.

use crate::ir::{
    ArgDef, BinaryFn, Element, Inst, Kernel, Literal, Loop, Stmt, Storage, UnaryFn, Value, ViewId,
};
use std::collections::BTreeSet;
use std::fmt::{self, Write};

/// Binding numbers before the weights.
pub const FIRST_WEIGHT: u32 = 2;

const PRELUDE: &str = "\
var<private> bits_of_infinity: u32 = 0x7f800000u;
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn least(a: f32, b: f32) -> f32 { return select(min(a, b), a + b, is_nan(a) | is_nan(b)); }
fn most(a: f32, b: f32) -> f32 { return select(max(a, b), a + b, is_nan(a) | is_nan(b)); }
fn quotient(a: i32, b: i32) -> i32 { return select(a / select(b, 1, b == 0), 0, b == 0); }
fn remainder(a: i32, b: i32) -> i32 { return select(a % select(b, 1, b == 0), 0, b == 0); }
fn to_int(x: f32) -> i32 {
  let whole = i32(clamp(x, -2147483648.0, 2147483520.0));
  return select(select(whole, 2147483647, x >= 2147483648.0), 0, is_nan(x));
}
";

const BRAINS: &str = "\
fn brain(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select((bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u, (bits >> 16u) | 0x40u, is_nan(x));
}
fn pack_brains(a: f32, b: f32) -> i32 { return bitcast<i32>(brain(a) | (brain(b) << 16u)); }
";

/// The text of a kernel.
pub fn print(kernel: &Kernel) -> String {
    let mut printer = Printer { kernel, text: String::new(), depth: 1 };
    // Writing to a string does not fail.
    let _ = printer.kernel();
    if printer.text.contains("pack_brains(") {
        printer.text.push_str(BRAINS);
    }
    printer.text
}

struct Printer<'k> {
    kernel: &'k Kernel,
    text: String,
    depth: usize,
}

fn type_name(element: Element) -> &'static str {
    match element {
        Element::Bool => "bool",
        Element::I32 => "i32",
        Element::F32 => "f32",
    }
}

fn float(bits: u32) -> String {
    let value = f32::from_bits(bits);
    match value.is_finite() {
        true if value == 0.0 && value.is_sign_negative() => "bitcast<f32>(bits_of_infinity << 8u)".to_owned(),
        true => format!("{value:?}f"),
        // A constant that is not finite is an error of the language.
        false => format!("bitcast<f32>(bits_of_infinity ^ {:#x}u)", bits ^ f32::INFINITY.to_bits()),
    }
}

/// What the arrays shared by lanes are called: one for folds of each element, one for each stage.
fn shared(body: &[Stmt], kernel: &Kernel, found: &mut BTreeSet<(String, &'static str)>) {
    for stmt in body {
        match &stmt.inst {
            Inst::Fold(_, x) => {
                let element = type_name(kernel.ty(*x).element);
                found.insert((format!("fold_{element}"), element));
            }
            Inst::Stage(x) => {
                let element = type_name(kernel.ty(*x).element);
                found.insert((format!("stage_{}", stmt.results[0].0), element));
            }
            Inst::Loop(turn) => shared(&turn.body, kernel, found),
            _ => {}
        }
    }
}

impl Printer<'_> {
    fn kernel(&mut self) -> fmt::Result {
        let kernel = self.kernel;
        writeln!(self.text, "// {} {}", kernel.name, kernel.hash())?;
        writeln!(self.text, "@group(0) @binding(0) var<storage, read> args: array<i32>;")?;
        writeln!(self.text, "@group(0) @binding(1) var<storage, read_write> arena: array<u32>;")?;
        for weight in 0..kernel.weights() {
            let at = FIRST_WEIGHT + weight;
            writeln!(self.text, "@group(0) @binding({at}) var<storage, read> weight{weight}: array<u32>;")?;
        }
        for state in 0..kernel.states() {
            let at = FIRST_WEIGHT + kernel.weights() + state;
            writeln!(
                self.text,
                "@group(0) @binding({at}) var<storage, read_write> state{state}: array<u32>;"
            )?;
        }
        let mut arrays = BTreeSet::new();
        shared(&kernel.body, kernel, &mut arrays);
        for (name, element) in arrays {
            writeln!(self.text, "var<workgroup> {name}: array<{element}, {}>;", kernel.lanes)?;
        }
        for (at, tile) in kernel.tiles.iter().enumerate() {
            let element = type_name(tile.element);
            writeln!(self.text, "var<workgroup> tile{at}: array<{element}, {}>;", tile.words)?;
        }
        self.text.push_str(PRELUDE);
        writeln!(self.text, "@compute @workgroup_size({})", kernel.lanes)?;
        writeln!(
            self.text,
            "fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, \
             @builtin(local_invocation_index) lane: u32) {{"
        )?;
        writeln!(self.text, "  let program = i32(group.y * groups.x + group.x);")?;
        for (at, def) in kernel.args.iter().enumerate() {
            match def {
                ArgDef::Known(value) => writeln!(self.text, "  let a{at} = {value}i;")?,
                _ => writeln!(self.text, "  let a{at} = args[{at}];")?,
            }
        }
        self.block(&kernel.body)?;
        writeln!(self.text, "}}")
    }

    fn line(&mut self, text: fmt::Arguments<'_>) -> fmt::Result {
        write!(self.text, "{:1$}", "", self.depth * 2)?;
        self.text.write_fmt(text)?;
        self.text.push('\n');
        Ok(())
    }

    fn block(&mut self, body: &[Stmt]) -> fmt::Result {
        body.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    fn stmt(&mut self, stmt: &Stmt) -> fmt::Result {
        let v = stmt.results.first().map_or(0, |v| v.0);
        match &stmt.inst {
            Inst::Const(Literal::Bool(value)) => self.line(format_args!("let v{v} = {value};")),
            Inst::Const(Literal::I32(i32::MIN)) => self.line(format_args!("let v{v} = i32(-2147483648);")),
            Inst::Const(Literal::I32(value)) => self.line(format_args!("let v{v} = {value}i;")),
            Inst::Const(Literal::F32(bits)) => self.line(format_args!("let v{v} = {};", float(*bits))),
            Inst::Arg(arg) => self.line(format_args!("let v{v} = a{};", arg.0)),
            Inst::Program => self.line(format_args!("let v{v} = program;")),
            Inst::Lane => self.line(format_args!("let v{v} = i32(lane);")),
            Inst::Unary(function, x) => {
                let text = self.unary(*function, *x);
                self.line(format_args!("let v{v} = {text};"))
            }
            Inst::Binary(function, a, b) => {
                let text = self.binary(*function, *a, *b);
                self.line(format_args!("let v{v} = {text};"))
            }
            Inst::Select(c, a, b) => {
                self.line(format_args!("let v{v} = select(v{}, v{}, v{});", b.0, a.0, c.0))
            }
            Inst::Fma(a, b, c) => self.line(format_args!("let v{v} = fma(v{}, v{}, v{});", a.0, b.0, c.0)),
            Inst::Dot4(a, b, c) => {
                let dot = format!("dot4I8Packed(bitcast<u32>(v{}), bitcast<u32>(v{}))", a.0, b.0);
                self.line(format_args!("let v{v} = {dot} + v{};", c.0))
            }
            Inst::Lookup(x, table) => self.lookup(v, x.0, table),
            Inst::Put { tile, at, values } => values.iter().enumerate().try_for_each(|(i, value)| {
                self.line(format_args!("tile{}[v{} + {i}] = v{};", tile.0, at.0, value.0))
            }),
            Inst::Take { tile, at } => stmt.results.iter().enumerate().try_for_each(|(i, result)| {
                self.line(format_args!("let v{} = tile{}[v{} + {i}];", result.0, tile.0, at.0))
            }),
            // A device of this language is not asked for it; the text would be refused.
            Inst::Fragment { .. } | Inst::Mma { .. } | Inst::MmaBytes { .. } => {
                self.line(format_args!("warps do not multiply in this language"))
            }
            Inst::Barrier => self.line(format_args!("workgroupBarrier();")),
            Inst::Digit { linear, extents, axis } => {
                let axis = *axis as usize;
                let after: Vec<String> = extents[axis + 1..].iter().map(|e| format!("a{}", e.0)).collect();
                let mut text = format!("v{}", linear.0);
                if !after.is_empty() {
                    text = format!("quotient({text}, {})", after.join(" * "));
                }
                if axis > 0 {
                    text = format!("remainder({text}, a{})", extents[axis].0);
                }
                self.line(format_args!("let v{v} = {text};"))
            }
            Inst::Load { view, at, mask } => self.load(&stmt.results, *view, at, *mask),
            Inst::Store { view, at, value, mask } => {
                let index = super::index(self.kernel, *view, at);
                let array = super::array(self.kernel.views[view.0 as usize].binding);
                let word = match self.kernel.ty(*value).element {
                    Element::Bool => format!("select(0u, 1u, v{})", value.0),
                    _ => format!("bitcast<u32>(v{})", value.0),
                };
                match mask {
                    Some(m) => self.line(format_args!("if (v{}) {{ {array}[{index}] = {word}; }}", m.0)),
                    None => self.line(format_args!("{array}[{index}] = {word};")),
                }
            }
            Inst::Fold(function, x) => self.fold(v, *function, *x),
            Inst::Stage(x) => {
                self.line(format_args!("workgroupBarrier();"))?;
                self.line(format_args!("stage_{v}[lane] = v{};", x.0))?;
                self.line(format_args!("workgroupBarrier();"))
            }
            Inst::Peek { tile, at } => {
                self.line(format_args!("let v{v} = stage_{}[u32(v{})];", tile.0, at.0))
            }
            Inst::Check { holds, mask, slot } => {
                self.line(format_args!("if (v{} & !v{}) {{ arena[a{}] = 1u; }}", mask.0, holds.0, slot.0))
            }
            Inst::Loop(turn) => self.repeat(&stmt.results, turn),
        }
    }

    /// Of each byte the word of the table that its upper bits name, and of that the byte that its lower ones do.
    fn lookup(&mut self, v: u32, x: u32, table: &[i8; 16]) -> fmt::Result {
        let [t0, t1, t2, t3] = super::words_of(table);
        for i in 0..4 {
            self.line(format_args!("let n{v}_{i} = bitcast<u32>(v{x}) >> {}u;", 8 * i))?;
            let pair = |a: u32, b: u32| format!("select({a}u, {b}u, (n{v}_{i} & 4u) != 0u)");
            let (low, high) = (pair(t0, t1), pair(t2, t3));
            let word = format!("select({low}, {high}, (n{v}_{i} & 8u) != 0u)");
            self.line(format_args!("let b{v}_{i} = ({word} >> ((n{v}_{i} & 3u) * 8u)) & 255u;"))?;
        }
        let bytes = "(b0) | (b1 << 8u) | (b2 << 16u) | (b3 << 24u)".replace('b', &format!("b{v}_"));
        self.line(format_args!("let v{v} = bitcast<i32>({bytes});"))
    }

    fn unary(&self, function: UnaryFn, x: Value) -> String {
        let x = x.0;
        let call = |name: &str| format!("{name}(v{x})");
        match function {
            UnaryFn::Neg => format!("-v{x}"),
            UnaryFn::Not => format!("!v{x}"),
            UnaryFn::Abs => call("abs"),
            UnaryFn::Exp => call("exp"),
            UnaryFn::Log => call("log"),
            UnaryFn::Sqrt => call("sqrt"),
            UnaryFn::Sin => call("sin"),
            UnaryFn::Cos => call("cos"),
            UnaryFn::Floor => call("floor"),
            UnaryFn::Ceil => call("ceil"),
            UnaryFn::RoundEven => call("round"),
            UnaryFn::Trunc => call("trunc"),
            UnaryFn::IsNan => call("is_nan"),
            UnaryFn::ToFloat => call("f32"),
            UnaryFn::ToInt => call("to_int"),
            UnaryFn::Bits => call("bitcast<i32>"),
            UnaryFn::FromBits => call("bitcast<f32>"),
            UnaryFn::LowHalf => format!("unpack2x16float(bitcast<u32>(v{x})).x"),
            UnaryFn::HighHalf => format!("unpack2x16float(bitcast<u32>(v{x})).y"),
        }
    }

    fn binary(&self, function: BinaryFn, a: Value, b: Value) -> String {
        let element = self.kernel.ty(a).element;
        let (a, b) = (a.0, b.0);
        let infix = |sign: &str| format!("v{a} {sign} v{b}");
        let call = |name: &str| format!("{name}(v{a}, v{b})");
        let (truth, float) = (element == Element::Bool, element == Element::F32);
        match function {
            BinaryFn::Add => infix("+"),
            BinaryFn::Sub => infix("-"),
            BinaryFn::Mul => infix("*"),
            BinaryFn::Div if float => infix("/"),
            BinaryFn::Div => call("quotient"),
            BinaryFn::Rem => call("remainder"),
            BinaryFn::Pow => call("pow"),
            BinaryFn::Min => call(if float { "least" } else { "min" }),
            BinaryFn::Max => call(if float { "most" } else { "max" }),
            BinaryFn::And => infix("&"),
            BinaryFn::Or => infix("|"),
            BinaryFn::Xor => infix(if truth { "!=" } else { "^" }),
            BinaryFn::ShiftRight => format!("bitcast<i32>(bitcast<u32>(v{a}) >> bitcast<u32>(v{b}))"),
            BinaryFn::PackHalves => format!("bitcast<i32>(pack2x16float(vec2<f32>(v{a}, v{b})))"),
            BinaryFn::PackBrains => call("pack_brains"),
            BinaryFn::Equal => infix("=="),
            BinaryFn::Less => infix("<"),
            BinaryFn::LessEqual => infix("<="),
        }
    }

    fn load(&mut self, results: &[Value], id: ViewId, at: &[Value], mask: Option<Value>) -> fmt::Result {
        let v = results.first().map_or(0, |v| v.0);
        let view = &self.kernel.views[id.0 as usize];
        let index = super::index(self.kernel, id, at);
        let array = super::array(view.binding);
        let half = |word: String| format!("({word} >> (u32(i{v} & 1) * 16u))");
        let load = |along: usize| {
            let word = match (view.storage, along) {
                (Storage::Word(_), 0) => format!("{array}[i{v}]"),
                (Storage::Word(_), along) => format!("{array}[i{v} + {along}]"),
                _ => format!("{array}[i{v} / 2]"),
            };
            match view.storage {
                Storage::Word(Element::Bool) => format!("{word} != 0u"),
                Storage::Word(Element::I32) => format!("bitcast<i32>({word})"),
                Storage::Word(Element::F32) => format!("bitcast<f32>({word})"),
                Storage::HalfPair => format!("unpack2x16float({}).x", half(word)),
                Storage::BrainPair => format!("bitcast<f32>({} << 16u)", half(word)),
            }
        };
        let element = type_name(view.storage.element());
        match mask {
            Some(m) => {
                let mut loads = String::new();
                for (along, result) in results.iter().enumerate() {
                    self.line(format_args!("var v{} = {element}();", result.0))?;
                    write!(loads, " v{} = {};", result.0, load(along))?;
                }
                self.line(format_args!("if (v{}) {{ let i{v} = {index};{loads} }}", m.0))
            }
            None => {
                self.line(format_args!("let i{v} = {index};"))?;
                let mut each = results.iter().enumerate();
                each.try_for_each(|(i, result)| self.line(format_args!("let v{} = {};", result.0, load(i))))
            }
        }
    }

    fn fold(&mut self, v: u32, function: BinaryFn, x: Value) -> fmt::Result {
        let element = self.kernel.ty(x).element;
        let array = format!("fold_{}", type_name(element));
        let (near, far) = (format!("{array}[lane]"), format!("{array}[lane + s{v}]"));
        let both = match function {
            BinaryFn::Mul => format!("{near} * {far}"),
            BinaryFn::Min if element == Element::F32 => format!("least({near}, {far})"),
            BinaryFn::Max if element == Element::F32 => format!("most({near}, {far})"),
            BinaryFn::Min => format!("min({near}, {far})"),
            BinaryFn::Max => format!("max({near}, {far})"),
            _ => format!("{near} + {far}"),
        };
        self.line(format_args!("{near} = v{};", x.0))?;
        self.line(format_args!("workgroupBarrier();"))?;
        let half = self.kernel.lanes / 2;
        self.line(format_args!("for (var s{v} = {half}u; s{v} > 0u; s{v} = s{v} / 2u) {{"))?;
        self.line(format_args!("  if (lane < s{v}) {{ {near} = {both}; }}"))?;
        self.line(format_args!("  workgroupBarrier();"))?;
        self.line(format_args!("}}"))?;
        self.line(format_args!("let v{v} = workgroupUniformLoad(&{array}[0]);"))
    }

    fn repeat(&mut self, results: &[Value], turn: &Loop) -> fmt::Result {
        for c in &turn.carried {
            self.line(format_args!("var c{} = v{};", c.param.0, c.first.0))?;
        }
        let (index, from, to, step) = (turn.index.0, turn.from.0, turn.to.0, turn.step);
        self.line(format_args!("for (var n{index} = v{from}; n{index} < v{to}; n{index} += {step}) {{"))?;
        self.depth += 1;
        self.line(format_args!("let v{index} = n{index};"))?;
        for c in &turn.carried {
            self.line(format_args!("let v{0} = c{0};", c.param.0))?;
        }
        self.block(&turn.body)?;
        for c in &turn.carried {
            self.line(format_args!("c{} = v{};", c.param.0, c.next.0))?;
        }
        self.depth -= 1;
        self.line(format_args!("}}"))?;
        for (result, c) in results.iter().zip(&turn.carried) {
            self.line(format_args!("let v{} = c{};", result.0, c.param.0))?;
        }
        Ok(())
    }
}
