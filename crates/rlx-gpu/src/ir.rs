//! The kernel description that every printer and the interpreter read.
//!
//! A kernel is run by a grid of programs. A program has a fixed number of lanes and computes on tiles of one element a lane, or on
//! uniform values, which all lanes share. Statements are in SSA form. There is no branch: loads and stores are masked, and a loop runs
//! equally often in every lane, so every fold and every staged tile is reached by all lanes together.
//!
//! Memory is reached through views: a base, extents and strides over one binding, all of them arguments that the host fills in for each
//! run. Every element of a binding is one 32-bit word, but for weights of 16 bits, which stand in pairs. A coordinate of a load or store
//! must be provably below its extent, or masked so that it is; [`verify`](verify::verify) sees to it. The host checks that a view's
//! extents stay inside its binding.
//!
//! Lanes pass values on through tiles. Where a lane puts is a function of its number alone, so that the verifier can see that no two lanes
//! put the same word; a barrier must stand between puts and takes of one tile, whichever comes first.

#![forbid(unsafe_code)]

pub mod build;
pub mod gemm;
pub mod interpret;
pub mod text;
mod tiles;
pub mod verify;

/// The result of a statement, an index of a loop or a value it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// An argument: an integer that the host gives for a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Arg(pub u32);

/// A view of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ViewId(pub u32);

/// A tile of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TileId(pub u32);

/// What an element of a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// A truth value.
    Bool,
    /// A signed integer of 32 bits; arithmetic wraps.
    I32,
    /// A binary32.
    F32,
}

/// Element and extent of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Type {
    /// The element.
    pub element: Element,
    /// The same in all lanes.
    pub uniform: bool,
    /// Shared by the lanes: what a stage gives, read by a peek.
    pub staged: bool,
}

/// What two floats of 16 bits in a word are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// Binary16.
    Half,
    /// Bfloat16.
    Brain,
}

/// How elements lie in a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// A word each: a binary32, an integer, or 0 and 1.
    Word(Element),
    /// Two binary16 a word, read only.
    HalfPair,
    /// Two bfloat16 a word, read only.
    BrainPair,
}

impl Storage {
    /// What a load gives.
    pub fn element(self) -> Element {
        match self {
            Storage::Word(element) => element,
            Storage::HalfPair | Storage::BrainPair => Element::F32,
        }
    }
}

/// Where a view's words stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Binding {
    /// The arena of a run; read and written.
    Arena,
    /// A weight of this position; read only.
    Weight(u32),
    /// A state of this position, which stays on the device between runs; read and written.
    State(u32),
}

/// What a kernel may do with a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Both, each element by one lane.
    Update,
}

/// Elements of a binding seen through a base, extents and strides.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct View {
    /// Where it stands.
    pub binding: Binding,
    /// How its elements lie.
    pub storage: Storage,
    /// What may be done with it.
    pub access: Access,
    /// The first element.
    pub base: Arg,
    /// Extents, outermost first.
    pub extents: Vec<Arg>,
    /// Elements from one coordinate to the next, an axis each.
    pub strides: Vec<Arg>,
    /// Elements that one load gives at most: 1, 2 or 4. Base and strides are multiples of it, but for the last stride, which is 1.
    pub wide: u32,
}

/// Memory that the lanes of a program share; nothing stands in it when a program begins.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tile {
    /// A float or an integer.
    pub element: Element,
    /// How many.
    pub words: u32,
}

/// Where an argument's value comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ArgDef {
    /// The host's size of this position.
    Size(u32),
    /// A number.
    Known(i32),
    /// Other arguments multiplied.
    Product(Vec<Arg>),
    /// The base of a view.
    Base(ViewId),
    /// The stride of a view's axis.
    Stride(ViewId, u32),
}

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnaryFn {
    /// `-x` of numbers.
    Neg,
    /// `|x|` of numbers.
    Abs,
    /// `e^x`
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// Sine.
    Sin,
    /// Cosine.
    Cos,
    /// Largest integer not above.
    Floor,
    /// Smallest integer not below.
    Ceil,
    /// Nearest integer, ties to even.
    RoundEven,
    /// Integer part.
    Trunc,
    /// Logical negation.
    Not,
    /// Whether a float is NaN, told by its bits.
    IsNan,
    /// An integer as float.
    ToFloat,
    /// A float as integer: truncates, saturates, NaN gives 0.
    ToInt,
    /// A float's bits.
    Bits,
    /// The float of these bits.
    FromBits,
    /// The binary16 of an integer's low bits.
    LowHalf,
    /// The binary16 of an integer's high bits.
    HighHalf,
}

/// A function of two values of one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BinaryFn {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`; integers truncate toward zero, and division by zero gives zero.
    Div,
    /// Remainder of integers with the sign of the dividend; by zero it is zero.
    Rem,
    /// `a ^ b` of floats for a > 0.
    Pow,
    /// The smaller; NaN if either is.
    Min,
    /// The larger; NaN if either is.
    Max,
    /// And, of truths or bits.
    And,
    /// Or, of truths or bits.
    Or,
    /// Exclusive or, of truths or bits.
    Xor,
    /// Logical shift of bits to the right.
    ShiftRight,
    /// `a == b`
    Equal,
    /// `a < b`
    Less,
    /// `a <= b`
    LessEqual,
    /// Two floats rounded to binary16: the first in the low bits of an integer, the second in the high ones.
    PackHalves,
    /// The same, rounded to bfloat16.
    PackBrains,
}

impl BinaryFn {
    /// Whether the result is a truth value whatever the operands are.
    pub fn compares(self) -> bool {
        matches!(self, BinaryFn::Equal | BinaryFn::Less | BinaryFn::LessEqual)
    }
}

/// A constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Literal {
    /// A truth value.
    Bool(bool),
    /// An integer.
    I32(i32),
    /// The bits of a float.
    F32(u32),
}

/// A value that a loop hands from one turn to the next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Carried {
    /// Before the first turn.
    pub first: Value,
    /// Within a turn.
    pub param: Value,
    /// After a turn.
    pub next: Value,
}

/// A loop: `index` runs from `from` below `to`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Loop {
    /// First index.
    pub from: Value,
    /// First index that is too large.
    pub to: Value,
    /// Distance of indices.
    pub step: u32,
    /// The index within a turn.
    pub index: Value,
    /// What turns hand on.
    pub carried: Vec<Carried>,
    /// A turn.
    pub body: Vec<Stmt>,
}

/// A statement and its results: one, but none for stores, puts, checks and barriers, as many as are loaded or taken, and one for each
/// value that a loop carries.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stmt {
    /// The results.
    pub results: Vec<Value>,
    /// What is done.
    pub inst: Inst,
}

/// What a statement does.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Inst {
    /// A constant.
    Const(Literal),
    /// An argument.
    Arg(Arg),
    /// The number of the program, from 0.
    Program,
    /// The number of the lane, from 0.
    Lane,
    /// A function of one value.
    Unary(UnaryFn, Value),
    /// A function of two.
    Binary(BinaryFn, Value, Value),
    /// `condition ? a : b`
    Select(Value, Value, Value),
    /// `a * b + c` of floats, rounded once where the device can.
    Fma(Value, Value, Value),
    /// `c` and the products of the four signed bytes of `a` and `b`, of integers.
    Dot4(Value, Value, Value),
    /// A word whose bytes are the entries of a table that the lower four bits of each byte name.
    Lookup(Value, [i8; 16]),
    /// The coordinate at `axis` of a linear index into `extents`, which for the first axis may lie beyond its extent.
    Digit {
        /// The linear index.
        linear: Value,
        /// The extents, outermost first.
        extents: Vec<Arg>,
        /// The axis.
        axis: u32,
    },
    /// The element at coordinates and those after it along the last axis, as many as there are results; zero where the mask is false.
    Load {
        /// The view.
        view: ViewId,
        /// A coordinate for each axis.
        at: Vec<Value>,
        /// Where to load; everywhere if none is given.
        mask: Option<Value>,
    },
    /// Writes the element at coordinates.
    Store {
        /// The view.
        view: ViewId,
        /// A coordinate for each axis.
        at: Vec<Value>,
        /// What is written.
        value: Value,
        /// Where to store; everywhere if none is given.
        mask: Option<Value>,
    },
    /// A value combined over all lanes, in the order of a tree.
    Fold(BinaryFn, Value),
    /// A value that all lanes can see.
    Stage(Value),
    /// The element of a staged value that another lane gave: `at` is a lane.
    Peek {
        /// The staged value.
        tile: Value,
        /// The lane.
        at: Value,
    },
    /// Where `holds` is false and the mask true, word `slot` of the arena becomes 1.
    Check {
        /// What must hold.
        holds: Value,
        /// Where it must.
        mask: Value,
        /// The word.
        slot: Arg,
    },
    /// Writes consecutive words of a tile: 1, 2 or 4, from a multiple of so many.
    Put {
        /// The tile.
        tile: TileId,
        /// The first word: a function of the lane.
        at: Value,
        /// What is written.
        values: Vec<Value>,
    },
    /// Consecutive words of a tile, as many as there are results: 1, 2 or 4, from a multiple of so many.
    Take {
        /// The tile.
        tile: TileId,
        /// The first word.
        at: Value,
    },
    /// For each 32 lanes together, 16 lines of 8 words of a tile, of which each lane has four words: with `g` and `t` its number among the 32
    /// divided by 4 and the rest, word `t` of lines `g` and `g + 8`, then word `t + 4` of both.
    Fragment {
        /// A tile of integers.
        tile: TileId,
        /// The first word of the first line: a multiple of 4, the same in the 32 lanes.
        at: Value,
        /// Words from one line to the next: a multiple of 4.
        pitch: u32,
        /// How many lines there are, a power of two up to 16; behind the last comes the first again.
        lines: u32,
    },
    /// For each 32 lanes together, `a b^T` of 16 rows and 8 columns over 16 products added to sums, of which each lane has four: with `g` and
    /// `t` as for fragments, those of rows `g`, `g`, `g + 8`, `g + 8` and columns `2 t`, `2 t + 1`, `2 t`, `2 t + 1`. The order of the sums is
    /// the device's, the same wherever a row or column stands. Results: the new sums.
    Mma {
        /// What the 16-bit floats are, which stand in pairs in both operands.
        pairs: Pairs,
        /// A fragment, whose lines are the rows.
        rows: [Value; 4],
        /// The first and third word of a fragment, whose lines `g` are the columns, or its second and fourth, for lines `g + 8`.
        columns: [Value; 2],
        /// The sums so far.
        sums: [Value; 4],
    },
    /// As [`Inst::Mma`] of signed bytes, four a word: over 32 products, or 16, added to sums of integers. Results: the new sums.
    MmaBytes {
        /// A fragment, or its first or last two words.
        rows: Vec<Value>,
        /// Half as many words, of a fragment's columns as there.
        columns: Vec<Value>,
        /// The sums so far.
        sums: [Value; 4],
    },
    /// What lanes have put is there for all of them, and what they have taken may be put again.
    Barrier,
    /// A loop.
    Loop(Box<Loop>),
}

/// A kernel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Its name in reports.
    pub name: String,
    /// Lanes of a program: a power of two.
    pub lanes: u32,
    /// Where each argument comes from.
    pub args: Vec<ArgDef>,
    /// Its views.
    pub views: Vec<View>,
    /// Its tiles.
    pub tiles: Vec<Tile>,
    /// The type of each value.
    pub types: Vec<Type>,
    /// What a program does.
    pub body: Vec<Stmt>,
    /// The product that it is, if a library may compute that in its place.
    pub gemm: Option<gemm::Gemm>,
}

impl Kernel {
    /// How many of its arguments the device's host must know for its launch: all, if a library takes it.
    pub fn told(&self) -> usize {
        if self.gemm.is_some() { self.args.len() } else { 0 }
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> Type {
        self.types[value.0 as usize]
    }

    /// Number of weights that it binds.
    pub fn weights(&self) -> u32 {
        let weight = |view: &View| match view.binding {
            Binding::Weight(at) => at + 1,
            Binding::Arena | Binding::State(_) => 0,
        };
        self.views.iter().map(weight).max().unwrap_or(0)
    }

    /// Number of states that it binds, behind the weights.
    pub fn states(&self) -> u32 {
        let state = |view: &View| match view.binding {
            Binding::State(at) => at + 1,
            Binding::Arena | Binding::Weight(_) => 0,
        };
        self.views.iter().map(state).max().unwrap_or(0)
    }

    /// Whether it needs lanes in warps of 32 that multiply together.
    pub fn needs_mma(&self) -> bool {
        fn any(body: &[Stmt]) -> bool {
            body.iter().any(|stmt| match &stmt.inst {
                Inst::Mma { .. } | Inst::MmaBytes { .. } => true,
                Inst::Loop(turn) => any(&turn.body),
                _ => false,
            })
        }
        any(&self.body)
    }

    /// A digest of everything it does: the same on every machine and in every build that prints the same text.
    pub fn hash(&self) -> String {
        let digest = blake3::hash(self.to_string().as_bytes());
        digest.to_hex().as_str()[..32].to_owned()
    }

    /// The arguments, from the host's sizes and each view's base and strides; `None` for a value beyond 31 bits.
    pub fn arguments(&self, sizes: &[usize], views: &[Placement]) -> Option<Vec<i32>> {
        let mut values: Vec<i32> = Vec::with_capacity(self.args.len());
        for def in &self.args {
            let number = |n: usize| i32::try_from(n).ok();
            values.push(match def {
                ArgDef::Size(at) => number(sizes[*at as usize])?,
                ArgDef::Known(value) => *value,
                ArgDef::Product(parts) => {
                    let product = |a: i32, b: &Arg| a.checked_mul(values[b.0 as usize]);
                    parts.iter().try_fold(1, product)?
                }
                ArgDef::Base(view) => number(views[view.0 as usize].base)?,
                ArgDef::Stride(view, axis) => number(views[view.0 as usize].strides[*axis as usize])?,
            });
        }
        Some(values)
    }

    /// Words from a binding's start to a view's end, under these arguments; 0 for a view without elements.
    pub fn reach(&self, view: &View, arguments: &[i32]) -> u64 {
        let at = |arg: &Arg| u64::from(arguments[arg.0 as usize].max(0) as u32);
        if view.extents.iter().any(|e| at(e) == 0) {
            return 0;
        }
        let spans = view.extents.iter().zip(&view.strides).map(|(e, s)| (at(e) - 1).saturating_mul(at(s)));
        let elements = spans.fold(at(&view.base).saturating_add(1), u64::saturating_add);
        if matches!(view.storage, Storage::Word(_)) { elements } else { elements.div_ceil(2) }
    }
}

/// Where a view stands in a run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// The first element.
    pub base: usize,
    /// A stride for each axis.
    pub strides: Vec<usize>,
}
