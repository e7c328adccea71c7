//! Reading the text of a plan. What is read is checked before it is a plan: see [`Lir::verify`].

use crate::plan::lir::Lir;
use crate::plan::memory::ALIGNMENT;
use crate::plan::places::{Buffer, BufferId, BufferKind, Place};
use crate::plan::template::{InterfaceEntry, SizeCheck, StepSpec, Template};
use rlx_graph::text::{Blobs, CustomOps, ParseError, Scanner, find_op};
use rlx_tensor::{Dim, DimBinding, Shape, SizeId, SizeTable, Symbol};
use std::sync::Arc;

type Parsed<T> = Result<T, ParseError>;

/// Reads a plan of built-in ops. A plan that [`Lir::verify`] refuses is an error.
pub fn parse_lir(text: &str) -> Result<Lir, ParseError> {
    parse_lir_with(text, &|_, _| None)
}

/// Reads a plan that may hold ops from outside.
pub fn parse_lir_with(text: &str, custom: CustomOps<'_>) -> Result<Lir, ParseError> {
    let mut parser =
        LirParser { scan: Scanner::new(text), custom, blobs: Blobs::new(), parts: Parts::default() };
    parser.file()
}

/// What was read so far.
#[derive(Default)]
struct Parts {
    symbols: Vec<Symbol>,
    binding: DimBinding,
    sizes: SizeTable,
    /// Whether no symbol may come any more.
    sized: bool,
    claimed: Vec<(usize, SizeId, usize)>,
    buffers: Vec<Buffer>,
    offsets: Vec<usize>,
    interface: [Vec<InterfaceEntry>; 4],
    checks: Vec<SizeCheck>,
    steps: Vec<StepSpec>,
    arena: Option<usize>,
}

struct LirParser<'t> {
    scan: Scanner<'t>,
    custom: CustomOps<'t>,
    blobs: Blobs,
    parts: Parts,
}

const INTERFACE: [&str; 4] = ["input", "param", "state", "output"];

impl LirParser<'_> {
    fn file(&mut self) -> Parsed<Lir> {
        self.blobs = self.scan.blobs()?;
        self.scan.keyword("lir")?;
        let name = self.scan.string()?;
        self.scan.expect('{')?;
        while !self.scan.take('}') {
            if self.scan.peek().is_none() {
                return self.scan.fail("the plan is not closed");
            }
            let at = self.scan.at();
            let word = self.scan.word();
            match word {
                "symbol" => self.symbol(at)?,
                "size" => self.size()?,
                "buffer" => self.buffer()?,
                "check" => self.check()?,
                "step" => self.step()?,
                "arena" if self.parts.arena.is_none() => self.parts.arena = Some(self.integer()?),
                _ => match INTERFACE.iter().position(|&kind| kind == word) {
                    Some(kind) => self.entry(kind)?,
                    None => return self.scan.fail_at(at, format!("{word:?} begins no line of a plan")),
                },
            }
        }
        self.scan.end(&self.blobs)?;
        self.finish(name)
    }

    fn integer(&mut self) -> Parsed<usize> {
        let at = self.scan.at();
        let value = self.scan.number()?;
        usize::try_from(value).or_else(|_| self.scan.fail_at(at, "the number is too large"))
    }

    fn symbol(&mut self, at: usize) -> Parsed<()> {
        self.scan.peek();
        let named = self.scan.at();
        let word = self.scan.word();
        let dim = word.parse::<Dim>().or_else(|e| self.scan.fail_at(named, e.to_string()))?;
        let Some(symbol) = dim.as_symbol().cloned() else {
            return self.scan.fail_at(named, format!("{word:?} is no symbol"));
        };
        self.scan.expect('=')?;
        let value = self.integer()?;
        if self.parts.sized || self.parts.symbols.contains(&symbol) {
            return self.scan.fail_at(at, "symbols stand first, each once");
        }
        if let Err(e) = self.parts.binding.bind(&symbol, value) {
            return self.scan.fail_at(at, e.to_string());
        }
        self.parts.symbols.push(symbol);
        Ok(())
    }

    fn intern(&mut self, at: usize, dim: &Dim) -> Parsed<SizeId> {
        if !self.parts.sized {
            self.parts.sized = true;
            self.parts.sizes = SizeTable::new(self.parts.symbols.clone());
        }
        self.parts.sizes.intern(dim).or_else(|e| self.scan.fail_at(at, e.to_string()))
    }

    /// An expression that ends before one of these characters (outside brackets) or before the line does.
    fn size_until(&mut self, ends: &[char]) -> Parsed<SizeId> {
        self.scan.peek();
        let at = self.scan.at();
        let dim = self.scan.dim_until(ends)?;
        self.intern(at, &dim)
    }

    fn size(&mut self) -> Parsed<()> {
        let id = self.size_until(&['='])?;
        self.scan.expect('=')?;
        self.scan.peek();
        let at = self.scan.at();
        let value = self.integer()?;
        self.parts.claimed.push((at, id, value));
        Ok(())
    }

    fn buffer_id(&mut self) -> Parsed<usize> {
        self.scan.peek();
        let at = self.scan.at();
        let word = self.scan.word();
        let index = word.strip_prefix('b').and_then(|digits| digits.parse::<u32>().ok());
        match index {
            Some(index) if word == format!("b{index}") => Ok(index as usize),
            _ => self.scan.fail_at(at, format!("expected a buffer, found {word:?}")),
        }
    }

    fn buffer(&mut self) -> Parsed<()> {
        self.scan.peek();
        let at = self.scan.at();
        if self.buffer_id()? != self.parts.buffers.len() {
            return self.scan.fail_at(at, format!("expected buffer b{}", self.parts.buffers.len()));
        }
        self.scan.expect(':')?;
        self.scan.peek();
        let at = self.scan.at();
        let word = self.scan.word();
        let kind = match word {
            "arena" => BufferKind::Arena,
            "input" => BufferKind::Input(self.integer()?),
            "output" => BufferKind::Output(self.integer()?),
            "state" => BufferKind::State(self.integer()?),
            "param" => BufferKind::Param(self.integer()?),
            "const" => {
                self.scan.expect(',')?;
                let bytes = self.size_until(&['='])?;
                self.scan.expect('=')?;
                let shape = self.scan.shape()?;
                let tensor = self.scan.tensor(&shape, &self.blobs)?;
                self.parts.buffers.push(Buffer { kind: BufferKind::Const(tensor), bytes, first: 0, last: 0 });
                return Ok(());
            }
            _ => return self.scan.fail_at(at, format!("{word:?} owns no buffer")),
        };
        self.scan.expect(',')?;
        let bytes = self.size_until(&[','])?;
        let (mut first, mut last) = (0, 0);
        if matches!(kind, BufferKind::Arena) {
            self.scan.expect(',')?;
            self.scan.keyword("steps")?;
            first = self.integer()?;
            self.scan.expect('.')?;
            self.scan.expect('.')?;
            last = self.integer()?;
            self.scan.expect(',')?;
            self.scan.keyword("at")?;
            self.scan.peek();
            let at = self.scan.at();
            let offset = self.integer()?;
            if !offset.is_multiple_of(ALIGNMENT) || isize::try_from(offset).is_err() {
                return self.scan.fail_at(at, format!("an offset is a multiple of {ALIGNMENT}"));
            }
            self.parts.offsets.push(offset);
        }
        self.parts.buffers.push(Buffer { kind, bytes, first, last });
        Ok(())
    }

    fn place(&mut self) -> Parsed<Place> {
        self.scan.peek();
        let at = self.scan.at();
        let index = self.buffer_id()?;
        if index >= self.parts.buffers.len() {
            return self.scan.fail_at(at, format!("b{index} is not declared above"));
        }
        let offset = if self.scan.take('+') { self.integer()? } else { 0 };
        let stride = if self.scan.take('/') { Some(self.integer()?) } else { None };
        let shape = self.scan.shape()?;
        let dims = shape.dims().iter().map(|d| self.intern(at, d)).collect::<Parsed<_>>()?;
        Ok(Place { buffer: BufferId::from_index(index), offset, stride, dims, dtype: shape.dtype() })
    }

    fn entry(&mut self, kind: usize) -> Parsed<()> {
        self.scan.peek();
        let at = self.scan.at();
        let name = self.scan.string()?;
        if self.parts.interface[kind].iter().any(|e| e.name == name) {
            return self.scan.fail_at(at, format!("{} {name:?} is given twice", INTERFACE[kind]));
        }
        self.scan.expect(':')?;
        let place = self.place()?;
        let shape = shape_of(&self.parts.sizes, &place);
        self.parts.interface[kind].push(InterfaceEntry { name, shape, place });
        Ok(())
    }

    fn check(&mut self) -> Parsed<()> {
        let left = self.size_until(&['='])?;
        self.scan.expect('=')?;
        let right = self.size_before_word("in")?;
        self.scan.keyword("in")?;
        let node = self.scan.string()?;
        self.parts.checks.push(SizeCheck { left, right, node });
        Ok(())
    }

    fn size_before_word(&mut self, word: &str) -> Parsed<SizeId> {
        self.scan.peek();
        let at = self.scan.at();
        let dim = self.scan.dim_before(word)?;
        self.intern(at, &dim)
    }

    fn step(&mut self) -> Parsed<()> {
        let mut outputs = Vec::new();
        self.scan.peek();
        let mut at = self.scan.at();
        let mut word = self.scan.word();
        if self.scan.peek() != Some('(') {
            self.scan.rewind(at);
            loop {
                outputs.push(self.place()?);
                if !self.scan.take(',') {
                    break;
                }
            }
            self.scan.expect('=')?;
            self.scan.peek();
            at = self.scan.at();
            word = self.scan.word();
        }
        self.scan.expect('(')?;
        let mut inputs = Vec::new();
        while !self.scan.take(')') {
            inputs.push(self.place()?);
            if !self.scan.take(',') {
                self.scan.expect(')')?;
                break;
            }
        }
        let attrs = self.scan.attrs()?;
        let op = find_op(word, &attrs, self.custom).or_else(|reason| self.scan.fail_at(at, reason))?;
        self.scan.keyword("from")?;
        let location = self.scan.string()?;
        let step = StepSpec { op, inputs, outputs, location };
        if let Err(reason) = step.verify_op(&self.parts.sizes, &self.parts.checks) {
            return self.scan.fail_at(at, reason);
        }
        self.parts.steps.push(step);
        Ok(())
    }

    /// The plan, if everything read holds together.
    fn finish(&mut self, name: String) -> Parsed<Lir> {
        let Parts { binding, sizes, claimed, buffers, offsets, interface, checks, steps, arena, .. } =
            std::mem::take(&mut self.parts);
        let refuse = |reason: String| self.scan.fail(reason);
        let Some(arena) = arena else { return refuse("the plan has no arena".to_owned()) };
        let [inputs, params, states, outputs] = interface;
        let template =
            Template::from_parts(name, sizes, buffers, steps, [inputs, params, states, outputs], checks);
        let lir = match Lir::from_parts(Arc::new(template), &binding, offsets, arena) {
            Ok(lir) => lir,
            Err(e) => return refuse(e.to_string()),
        };
        for (at, id, value) in claimed {
            let found = lir.capacities()[id.index()];
            if found != value {
                return self.scan.fail_at(at, format!("the size is {found} at these capacities"));
            }
        }
        match lir.verify() {
            Ok(()) => Ok(lir),
            Err(violation) => refuse(violation.to_string()),
        }
    }
}

/// Dims and dtype of a place, as expressions.
fn shape_of(sizes: &SizeTable, place: &Place) -> Shape {
    Shape::from_dims(place.dims.iter().map(|&d| sizes.dim(d).clone()).collect(), place.dtype)
}
