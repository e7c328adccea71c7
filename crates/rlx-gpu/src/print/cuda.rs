//! Kernels as CUDA C++ for run-time compilation: no header is needed.
//!
//! The parameters are the arguments, the arena, then the weights and the states, each a pointer to 32-bit words.

use crate::ir::{
    ArgDef, BinaryFn, Element, Inst, Kernel, Literal, Loop, Pairs, Stmt, Storage, TileId, UnaryFn, Value,
    ViewId,
};
use std::fmt::{self, Write};

const PRELUDE: &str = "\
__device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
__device__ __forceinline__ float least(float a, float b) { return is_nan(a) || is_nan(b) ? a + b : fminf(a, b); }
__device__ __forceinline__ float most(float a, float b) { return is_nan(a) || is_nan(b) ? a + b : fmaxf(a, b); }
__device__ __forceinline__ int quotient(int a, int b) { return b == 0 ? 0 : b == -1 ? (int)(0u - (unsigned)a) : a / b; }
__device__ __forceinline__ int remainder_of(int a, int b) { return b == 0 || b == -1 ? 0 : a % b; }
__device__ __forceinline__ float half_of(unsigned word) {
  float y;
  asm(\"cvt.f32.f16 %0, %1;\" : \"=f\"(y) : \"h\"((unsigned short)word));
  return y;
}
__device__ __forceinline__ int pack_halves(float a, float b) {
  unsigned short x, y;
  asm(\"cvt.rn.f16.f32 %0, %1;\" : \"=h\"(x) : \"f\"(a));
  asm(\"cvt.rn.f16.f32 %0, %1;\" : \"=h\"(y) : \"f\"(b));
  return (int)((unsigned)x | (unsigned)y << 16);
}
__device__ __forceinline__ int pack_brains(float a, float b) {
  int y;
  asm(\"cvt.rn.bf16x2.f32 %0, %1, %2;\" : \"=r\"(y) : \"f\"(b), \"f\"(a));
  return y;
}
";

/// The name of every kernel's function.
pub const ENTRY: &str = "kernel";

/// The text of a kernel.
pub fn print(kernel: &Kernel) -> String {
    let mut printer = Printer { kernel, text: String::new(), depth: 1 };
    // Writing to a string does not fail.
    let _ = printer.kernel();
    printer.text
}

struct Printer<'k> {
    kernel: &'k Kernel,
    text: String,
    depth: usize,
}

fn name_of(element: Element) -> &'static str {
    match element {
        Element::Bool => "bool",
        Element::I32 => "int",
        Element::F32 => "float",
    }
}

/// The shared arrays that a body needs.
fn shared(body: &[Stmt], kernel: &Kernel, found: &mut Vec<String>) {
    for stmt in body {
        let array = match &stmt.inst {
            Inst::Fold(_, x) => {
                let element = name_of(kernel.ty(*x).element);
                format!("{element} fold_{element}")
            }
            Inst::Stage(x) => format!("{} stage_{}", name_of(kernel.ty(*x).element), stmt.results[0].0),
            Inst::Loop(turn) => {
                shared(&turn.body, kernel, found);
                continue;
            }
            _ => continue,
        };
        if !found.contains(&array) {
            found.push(array);
        }
    }
}

impl Printer<'_> {
    fn kernel(&mut self) -> fmt::Result {
        let kernel = self.kernel;
        writeln!(self.text, "// {} {}\n{PRELUDE}", kernel.name, kernel.hash())?;
        let weights = (0..kernel.weights()).map(|w| format!(", const unsigned *__restrict__ weight{w}"));
        let states = (0..kernel.states()).map(|s| format!(", unsigned *state{s}"));
        let weights: String = weights.chain(states).collect();
        // Without the second bound the compiler keeps registers for more programs at once, and spills what it has none for.
        let bounds = format!("__launch_bounds__({}, 1)", kernel.lanes);
        writeln!(self.text, "extern \"C\" __global__ void {bounds} {ENTRY}(")?;
        writeln!(self.text, "    const int *__restrict__ args, unsigned *arena{weights}) {{")?;
        let mut arrays = Vec::new();
        shared(&kernel.body, kernel, &mut arrays);
        for array in arrays {
            writeln!(self.text, "  __shared__ {array}[{}];", kernel.lanes)?;
        }
        for (at, tile) in kernel.tiles.iter().enumerate() {
            let element = name_of(tile.element);
            writeln!(self.text, "  __shared__ __align__(16) {element} tile{at}[{}];", tile.words)?;
        }
        writeln!(
            self.text,
            "  const int program = blockIdx.y * gridDim.x + blockIdx.x, lane = threadIdx.x;"
        )?;
        for (at, def) in kernel.args.iter().enumerate() {
            match def {
                ArgDef::Known(value) => writeln!(self.text, "  const int a{at} = {value};")?,
                _ => writeln!(self.text, "  const int a{at} = args[{at}];")?,
            }
        }
        self.block(&kernel.body)?;
        writeln!(self.text, "}}")
    }

    fn line(&mut self, text: &str) -> fmt::Result {
        writeln!(self.text, "{:1$}{text}", "", self.depth * 2)
    }

    fn set(&mut self, value: Value, text: &str) -> fmt::Result {
        let element = name_of(self.kernel.ty(value).element);
        self.line(&format!("const {element} v{} = {text};", value.0))
    }

    fn block(&mut self, body: &[Stmt]) -> fmt::Result {
        body.iter().try_for_each(|stmt| self.stmt(stmt))
    }

    fn stmt(&mut self, stmt: &Stmt) -> fmt::Result {
        let result = stmt.results.first().copied().unwrap_or(Value(0));
        match &stmt.inst {
            Inst::Const(literal) => {
                let text = match literal {
                    Literal::Bool(value) => value.to_string(),
                    Literal::I32(value) => format!("(int){:#x}u", *value as u32),
                    Literal::F32(bits) => format!("__uint_as_float({bits:#x}u)"),
                };
                self.set(result, &text)
            }
            Inst::Arg(arg) => self.set(result, &format!("a{}", arg.0)),
            Inst::Program => self.set(result, "program"),
            Inst::Lane => self.set(result, "lane"),
            Inst::Unary(function, x) => self.set(result, &self.unary(*function, *x)),
            Inst::Binary(function, a, b) => self.set(result, &self.binary(*function, *a, *b)),
            Inst::Select(c, a, b) => self.set(result, &format!("v{} ? v{} : v{}", c.0, a.0, b.0)),
            Inst::Fma(a, b, c) => self.set(result, &format!("__fmaf_rn(v{}, v{}, v{})", a.0, b.0, c.0)),
            Inst::Dot4(a, b, c) => self.set(result, &format!("__dp4a(v{}, v{}, v{})", a.0, b.0, c.0)),
            Inst::Lookup(x, table) => self.lookup(result, *x, table),
            Inst::Put { tile, at, values } => self.put(*tile, *at, values),
            Inst::Take { tile, at } => self.take(&stmt.results, *tile, *at),
            Inst::Fragment { tile, at, pitch, lines } => {
                self.fragment(&stmt.results, *tile, *at, *pitch, *lines)
            }
            Inst::Mma { pairs, rows, columns, sums } => self.mma(&stmt.results, *pairs, rows, columns, sums),
            Inst::MmaBytes { rows, columns, sums } => self.mma_bytes(&stmt.results, rows, columns, sums),
            Inst::Barrier => self.line("__syncthreads();"),
            Inst::Digit { linear, extents, axis } => {
                let after = extents[*axis as usize + 1..].iter().map(|e| format!(" * a{}", e.0));
                let rest = format!("quotient(v{}, 1{})", linear.0, after.collect::<String>());
                let digit = format!("remainder_of({rest}, a{})", extents[*axis as usize].0);
                self.set(result, if *axis == 0 { &rest } else { &digit })
            }
            Inst::Load { view, at, mask } => self.load(&stmt.results, *view, at, *mask),
            Inst::Store { view, at, value, mask } => {
                let word = match self.kernel.ty(*value).element {
                    Element::Bool => format!("v{} ? 1u : 0u", value.0),
                    Element::I32 => format!("(unsigned)v{}", value.0),
                    Element::F32 => format!("__float_as_uint(v{})", value.0),
                };
                let guard = mask.map_or(String::new(), |m| format!("if (v{}) ", m.0));
                let array = super::array(self.kernel.views[view.0 as usize].binding);
                self.line(&format!("{guard}{array}[{}] = {word};", super::index(self.kernel, *view, at)))
            }
            Inst::Fold(function, x) => self.fold(result, *function, *x),
            Inst::Stage(x) => {
                self.line(&format!("__syncthreads(); stage_{}[lane] = v{}; __syncthreads();", result.0, x.0))
            }
            Inst::Peek { tile, at } => self.set(result, &format!("stage_{}[v{}]", tile.0, at.0)),
            Inst::Check { holds, mask, slot } => {
                self.line(&format!("if (v{} && !v{}) arena[a{}] = 1u;", mask.0, holds.0, slot.0))
            }
            Inst::Loop(turn) => self.repeat(&stmt.results, turn),
        }
    }

    /// The names of entries brought together in four nibbles, by whose lower bits bytes of both halves are taken, and by the upper one of each.
    fn lookup(&mut self, result: Value, x: Value, table: &[i8; 16]) -> fmt::Result {
        let [t0, t1, t2, t3] = super::words_of(table).map(|word| format!("{word:#x}u"));
        let (r, x) = (result.0, x.0);
        self.line(&format!("unsigned n{r} = ((unsigned)v{x} | (unsigned)v{x} >> 4) & 0xff00ffu;"))?;
        self.line(&format!("n{r} = (n{r} | n{r} >> 8) & 0xffffu;"))?;
        let half = |a: &str, b: &str| format!("__byte_perm({a}, {b}, n{r} & 0x7777u)");
        let which = format!("(n{r} & 0x8888u) >> 1 | 0x3210u");
        let both = format!("__byte_perm({}, {}, {which})", half(&t0, &t1), half(&t2, &t3));
        self.set(result, &format!("(int){both}"))
    }

    fn unary(&self, function: UnaryFn, x: Value) -> String {
        let float = self.kernel.ty(x).element == Element::F32;
        let name = match function {
            UnaryFn::Neg if float => "-",
            UnaryFn::Neg => return format!("(int)(0u - (unsigned)v{})", x.0),
            UnaryFn::Abs if float => "fabsf",
            UnaryFn::Abs => return format!("v{0} < 0 ? (int)(0u - (unsigned)v{0}) : v{0}", x.0),
            UnaryFn::Exp => "expf",
            UnaryFn::Log => "logf",
            UnaryFn::Sqrt => "sqrtf",
            UnaryFn::Sin => "sinf",
            UnaryFn::Cos => "cosf",
            UnaryFn::Floor => "floorf",
            UnaryFn::Ceil => "ceilf",
            UnaryFn::RoundEven => "rintf",
            UnaryFn::Trunc => "truncf",
            UnaryFn::Not => "!",
            UnaryFn::IsNan => "is_nan",
            UnaryFn::ToFloat => "(float)",
            // Saturates, and gives 0 for NaN.
            UnaryFn::ToInt => "__float2int_rz",
            UnaryFn::Bits => "__float_as_int",
            UnaryFn::FromBits => "__int_as_float",
            UnaryFn::LowHalf => "half_of",
            UnaryFn::HighHalf => return format!("half_of((unsigned)v{} >> 16)", x.0),
        };
        format!("{name}(v{})", x.0)
    }

    fn binary(&self, function: BinaryFn, a: Value, b: Value) -> String {
        let element = self.kernel.ty(a).element;
        let (truth, float) = (element == Element::Bool, element == Element::F32);
        let (a, b) = (a.0, b.0);
        let infix = |sign: &str| format!("v{a} {sign} v{b}");
        let wrapping = |sign: &str| format!("(int)((unsigned)v{a} {sign} (unsigned)v{b})");
        let call = |name: &str| format!("{name}(v{a}, v{b})");
        match function {
            BinaryFn::Add if float => infix("+"),
            BinaryFn::Sub if float => infix("-"),
            BinaryFn::Mul if float => infix("*"),
            BinaryFn::Div if float => infix("/"),
            BinaryFn::Add => wrapping("+"),
            BinaryFn::Sub => wrapping("-"),
            BinaryFn::Mul => wrapping("*"),
            BinaryFn::Div => call("quotient"),
            BinaryFn::Rem => call("remainder_of"),
            BinaryFn::Pow => call("powf"),
            BinaryFn::Min => call(if float { "least" } else { "min" }),
            BinaryFn::Max => call(if float { "most" } else { "max" }),
            BinaryFn::And => infix(if truth { "&&" } else { "&" }),
            BinaryFn::Or => infix(if truth { "||" } else { "|" }),
            BinaryFn::Xor => infix(if truth { "!=" } else { "^" }),
            BinaryFn::ShiftRight => wrapping(">>"),
            BinaryFn::PackHalves => call("pack_halves"),
            BinaryFn::PackBrains => call("pack_brains"),
            BinaryFn::Equal => infix("=="),
            BinaryFn::Less => infix("<"),
            BinaryFn::LessEqual => infix("<="),
        }
    }

    /// The type of so many consecutive words.
    fn vector(element: Element, count: usize) -> String {
        let name = if element == Element::F32 { "float" } else { "int" };
        if count == 1 { name.to_owned() } else { format!("{name}{count}") }
    }

    fn put(&mut self, tile: TileId, at: Value, values: &[Value]) -> fmt::Result {
        let kind = Self::vector(self.kernel.tiles[tile.0 as usize].element, values.len());
        let list: Vec<String> = values.iter().map(|v| format!("v{}", v.0)).collect();
        let made =
            if values.len() == 1 { list.join("") } else { format!("make_{kind}({})", list.join(", ")) };
        self.line(&format!("*({kind} *)&tile{}[v{}] = {made};", tile.0, at.0))
    }

    /// Lanes 0 to 15 give where each line begins, the others where its second half does.
    fn fragment(
        &mut self,
        results: &[Value],
        tile: TileId,
        at: Value,
        pitch: u32,
        lines: u32,
    ) -> fmt::Result {
        let names: Vec<String> = results.iter().map(|r| format!("v{}", r.0)).collect();
        self.line(&format!("int {};", names.join(", ")))?;
        let word = format!("v{} + (lane & {}) * {pitch} + (lane >> 4 & 1) * 4", at.0, lines - 1);
        let from = format!("(unsigned)__cvta_generic_to_shared(&tile{}[{word}])", tile.0);
        let to: Vec<String> = results.iter().map(|r| format!("\"=r\"(v{})", r.0)).collect();
        let load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];";
        self.line(&format!("asm volatile(\"{load}\" : {} : \"r\"({from}) : \"memory\");", to.join(", ")))
    }

    fn mma(
        &mut self,
        results: &[Value],
        pairs: Pairs,
        rows: &[Value; 4],
        columns: &[Value; 2],
        sums: &[Value; 4],
    ) -> fmt::Result {
        let kind = if pairs == Pairs::Half { "f16" } else { "bf16" };
        let names: Vec<String> =
            results.iter().zip(sums).map(|(r, s)| format!("v{} = v{}", r.0, s.0)).collect();
        self.line(&format!("float {};", names.join(", ")))?;
        let words: Vec<String> = rows.iter().chain(columns).map(|w| format!("\"r\"(v{})", w.0)).collect();
        let c: Vec<String> = results.iter().map(|r| format!("\"+f\"(v{})", r.0)).collect();
        let shape = format!("mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32");
        let places = "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};";
        self.line(&format!("asm volatile(\"{shape} {places}\" : {} : {});", c.join(", "), words.join(", ")))
    }

    fn mma_bytes(
        &mut self,
        results: &[Value],
        rows: &[Value],
        columns: &[Value],
        sums: &[Value; 4],
    ) -> fmt::Result {
        let names: Vec<String> =
            results.iter().zip(sums).map(|(r, s)| format!("v{} = v{}", r.0, s.0)).collect();
        self.line(&format!("int {};", names.join(", ")))?;
        let words: Vec<String> = rows.iter().chain(columns).map(|w| format!("\"r\"(v{})", w.0)).collect();
        let c: Vec<String> = results.iter().map(|r| format!("\"+r\"(v{})", r.0)).collect();
        let (depth, places) = match columns.len() {
            1 => (16, "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"),
            _ => (32, "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"),
        };
        let shape = format!("mma.sync.aligned.m16n8k{depth}.row.col.s32.s8.s8.s32");
        self.line(&format!("asm volatile(\"{shape} {places}\" : {} : {});", c.join(", "), words.join(", ")))
    }

    fn take(&mut self, results: &[Value], tile: TileId, at: Value) -> fmt::Result {
        let kind = Self::vector(self.kernel.tiles[tile.0 as usize].element, results.len());
        let first = results.first().map_or(0, |v| v.0);
        if results.len() == 1 {
            return self.line(&format!("const {kind} v{first} = tile{}[v{}];", tile.0, at.0));
        }
        self.line(&format!("const {kind} t{first} = *(const {kind} *)&tile{}[v{}];", tile.0, at.0))?;
        let parts = results.iter().zip(["x", "y", "z", "w"]);
        let parts: Vec<String> = parts.map(|(v, part)| format!("v{} = t{first}.{part}", v.0)).collect();
        let name = name_of(self.kernel.tiles[tile.0 as usize].element);
        self.line(&format!("const {name} {};", parts.join(", ")))
    }

    fn load(&mut self, results: &[Value], id: ViewId, at: &[Value], mask: Option<Value>) -> fmt::Result {
        let first = results.first().map_or(0, |v| v.0);
        let view = &self.kernel.views[id.0 as usize];
        let array = super::array(view.binding);
        let half = format!("({array}[i / 2] >> (i & 1) * 16)");
        let load = match view.storage {
            Storage::Word(Element::Bool) => format!("{array}[i] != 0u"),
            Storage::Word(Element::I32) => format!("(int){array}[i]"),
            Storage::Word(Element::F32) => format!("__uint_as_float({array}[i])"),
            Storage::HalfPair => format!("half_of({half})"),
            Storage::BrainPair => format!("__uint_as_float({half} << 16)"),
        };
        let (element, index) = (name_of(view.storage.element()), super::index(self.kernel, id, at));
        let guard = mask.map_or(String::new(), |m| format!("if (v{}) ", m.0));
        if results.len() == 1 {
            let text = format!("{{ const int i = {index}; v{first} = {load}; }}");
            return self.line(&format!("{element} v{first} = 0; {guard}{text}"));
        }
        let kind = Self::vector(view.storage.element(), results.len());
        let names: Vec<String> = results.iter().map(|v| format!("v{} = 0", v.0)).collect();
        let parts = results.iter().zip(["x", "y", "z", "w"]);
        let parts: String = parts.map(|(v, part)| format!(" v{} = t.{part};", v.0)).collect();
        self.line(&format!("{element} {};", names.join(", ")))?;
        self.line(&format!("{guard}{{ const {kind} t = *(const {kind} *)({array} + ({index}));{parts} }}"))
    }

    fn fold(&mut self, v: Value, function: BinaryFn, x: Value) -> fmt::Result {
        let element = self.kernel.ty(x).element;
        let array = format!("fold_{}", name_of(element));
        let float = element == Element::F32;
        let (near, far) = (format!("{array}[lane]"), format!("{array}[lane + s]"));
        let both = match function {
            BinaryFn::Mul => format!("{near} * {far}"),
            BinaryFn::Min => format!("{}({near}, {far})", if float { "least" } else { "min" }),
            BinaryFn::Max => format!("{}({near}, {far})", if float { "most" } else { "max" }),
            _ => format!("{near} + {far}"),
        };
        self.line(&format!("__syncthreads(); {near} = v{}; __syncthreads();", x.0))?;
        let half = self.kernel.lanes / 2;
        let turn = format!("if (lane < s) {near} = {both}; __syncthreads();");
        self.line(&format!("for (int s = {half}; s > 0; s /= 2) {{ {turn} }}"))?;
        self.set(v, &format!("{array}[0]"))
    }

    fn repeat(&mut self, results: &[Value], turn: &Loop) -> fmt::Result {
        for c in &turn.carried {
            let element = name_of(self.kernel.ty(c.param).element);
            self.line(&format!("{element} c{} = v{};", c.param.0, c.first.0))?;
        }
        let (index, from, to, step) = (turn.index, turn.from.0, turn.to.0, turn.step);
        // What is to be unrolled is so already; more of it takes registers that there are not.
        self.line("#pragma unroll 1")?;
        self.line(&format!("for (int n{0} = v{from}; n{0} < v{to}; n{0} += {step}) {{", index.0))?;
        self.depth += 1;
        self.set(index, &format!("n{}", index.0))?;
        for c in &turn.carried {
            self.set(c.param, &format!("c{}", c.param.0))?;
        }
        self.block(&turn.body)?;
        for c in &turn.carried {
            self.line(&format!("c{} = v{};", c.param.0, c.next.0))?;
        }
        self.depth -= 1;
        self.line("}")?;
        let ends = results.iter().zip(&turn.carried);
        ends.into_iter().try_for_each(|(result, c)| self.set(*result, &format!("c{}", c.param.0)))
    }
}
