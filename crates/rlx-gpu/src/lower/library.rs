//! Products of many rows that are left to a library of the device, where it was opened with one.
//!
//! Such a product is a launch whose kernel says what is right, and whose place the library takes. Where more than a bias or a residual
//! follows, the sums stand in scratch memory and a launch finishes them as the other forms do. In bf16 a launch of a step's own packs
//! its rows two a word, once for all its parts and bands; weights of bf16 stand so already.

use super::blocks::{is_blocks, is_packed};
use super::lines::{Lines, offset, scaled};
use super::operands::Operands;
use super::product::{Finish, Product, Rows};
use super::{Amount, Draft, LANES, LowerCx, Operand, Room};
use crate::ir::gemm::Gemm;
use crate::ir::{BinaryFn, UnaryFn, Value, ViewId};
use rlx::backend::BackendError;
use rlx_tensor::DType;

/// What is left to a device's library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Library {
    /// Products of at least so many rows.
    pub rows: usize,
    /// And of at least so many columns and products of an element.
    pub width: usize,
    /// Words that it may use beside its operands.
    pub workspace: usize,
    /// As it counts its versions.
    pub version: usize,
}

impl Library {
    /// Fewer rows than a program of the own forms has leave the library nothing to win: either reads each weight once, and that takes
    /// longer than the products. So batches of a decoder's steps keep the bits that single rows have.
    #[cfg(any(feature = "cuda", test))]
    pub const ROWS: usize = super::schedules::Schedule::LARGE.rows as usize;
    #[cfg(any(feature = "cuda", test))]
    pub const WIDTH: usize = 64;
}

/// What a library multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Elements {
    Floats,
    /// Pairs of bfloat16.
    Brains,
}

/// Elements that a row must be a multiple of to be packed: 16 bytes, which matrix units load at once.
const ALIGNED: usize = 8;

impl Elements {
    fn name(self) -> &'static str {
        match self {
            Elements::Floats => "cublaslt_f32",
            Elements::Brains => "cublaslt_bf16",
        }
    }

    /// What a library would multiply in products of these matrices `[.., n, k]`; `None` for those it is not asked for.
    fn of(cx: &LowerCx<'_>, operands: Operands, matrices: &[Operand]) -> Option<Elements> {
        let library = cx.choices.library?;
        let wide = |o: &Operand| {
            let [.., n, k] = o.dims.as_slice() else { return false };
            [n, k].iter().all(|size| matches!(size, Amount::Known(size) if *size >= library.width))
        };
        let whole = |o: &Operand| match o.dims.as_slice() {
            [_, Amount::Known(k)] => {
                let plain = o.strides == [Amount::Known(*k), Amount::Known(1)] && o.base == Amount::Known(0);
                plain && k % ALIGNED == 0 && o.dtype == DType::BF16 && cx.is_weight(o)
            }
            _ => false,
        };
        let elements = match operands.of(matrices) {
            Operands::Floats if matrices.iter().all(|o| in_words(cx, o)) => Elements::Floats,
            Operands::Units { .. } if matrices.iter().all(whole) => Elements::Brains,
            _ => return None,
        };
        matrices.iter().all(wide).then_some(elements)
    }
}

/// Whether elements are floats of a word each.
fn in_words(cx: &LowerCx<'_>, o: &Operand) -> bool {
    match o.dtype {
        DType::F32 => true,
        DType::F16 | DType::BF16 => !cx.is_weight(o),
        other => is_blocks(other) && !is_packed(other),
    }
}

/// What a step has ready for its products by a library.
pub(super) struct Ready {
    library: Library,
    workspace: Operand,
    /// `[rows, k / 2]`: the rows packed.
    packed: Option<Operand>,
    /// Room behind both.
    room: Room,
}

impl Ready {
    /// For products of rows `[.., rows, k]` with some of these matrices `[.., n, k]`, if a library takes any.
    pub fn of(
        cx: &mut LowerCx<'_>,
        x: &Operand,
        operands: Operands,
        matrices: &[Operand],
        room: &mut Room,
    ) -> Result<Option<Ready>, BackendError> {
        let each = matrices.iter().filter_map(|o| Elements::of(cx, operands, std::slice::from_ref(o)));
        let (elements, rows) = (each.collect::<Vec<_>>(), x.dims[x.dims.len() - 2].clone());
        let Some(library) = cx.choices.library.filter(|_| !elements.is_empty()) else { return Ok(None) };
        let Some(_) = rows.when(library.rows, usize::MAX, rows.clone()) else { return Ok(None) };
        let words = [Amount::Known(library.workspace)];
        let workspace = room.take_from(DType::I32, &words, &rows, library.rows);
        let packed = match elements.contains(&Elements::Brains) {
            true => Some(pack(cx, x, library, room)?),
            false => None,
        };
        Ok(Some(Ready { library, workspace, packed, room: room.clone() }))
    }
}

/// Adds the launch that packs rows `[rows, k]`, k a known multiple of [`ALIGNED`].
fn pack(
    cx: &mut LowerCx<'_>,
    x: &Operand,
    library: Library,
    room: &mut Room,
) -> Result<Operand, BackendError> {
    const EACH: u32 = 4;
    let (rows, k) = (&x.dims[0], &x.dims[1]);
    let packed = room.take_from(DType::I32, &[rows.clone(), k.ceil_div(2)], rows, library.rows);
    let mut d = cx.draft("pack_rows_bf16");
    let cells = [rows.clone(), k.ceil_div(EACH as usize)];
    let linear = d.linear();
    let (at, inside) = d.coordinates(linear, &cells);
    let first = scaled(&mut d, at[1], EACH);
    let lines = Lines::new(&mut d, x);
    let values = lines.fetch(&mut d, &[], [at[0], first], inside, EACH);
    let values = lines.decode(&mut d, &values, |_| first, EACH);
    let (write, extent) = (d.write(&packed), d.size(&packed.dims[1]));
    let word = scaled(&mut d, at[1], EACH / 2);
    for (i, two) in values.chunks(2).enumerate() {
        let both = d.b.binary(BinaryFn::PackBrains, two[0], two[1]);
        let word = offset(&mut d, word, i as u32);
        let there = d.b.within(word, extent);
        let mask = d.b.and(inside, there);
        d.b.store(write, &[at[0], word], both, Some(mask));
    }
    let programs = Amount::product(&cells).ceil_div(LANES as usize);
    let programs = rows.when(library.rows, usize::MAX, programs).unwrap_or(Amount::Known(0));
    cx.launch(d, programs)?;
    Ok(packed)
}

/// A result that is a product and what a library adds to it.
pub(super) struct Plain<'s> {
    pub to: &'s Operand,
    /// `[n]`
    pub bias: Option<&'s Operand>,
    /// `[m, n]`
    pub residual: Option<&'s Operand>,
}

impl Plain<'_> {
    /// Whether a library can add it and store the result.
    fn is_taken(&self, cx: &LowerCx<'_>) -> bool {
        let vector = |o: &Operand| in_words(cx, o) && o.strides.last().is_some_and(Amount::is_one);
        self.to.dtype == DType::F32 && self.bias.is_none_or(vector) && self.residual.is_none_or(vector)
    }
}

/// One product, by a library where it has many rows.
pub(super) struct Shared<'s> {
    pub product: &'s Product<'s>,
    pub ready: Option<&'s Ready>,
    /// The result, if it is no more than this.
    pub plain: Option<Plain<'s>>,
}

impl Shared<'_> {
    /// Adds the launches for every number of rows, as [`Product::launch`] does.
    pub fn launch(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let Product { a, b, dims, operands, .. } = self.product;
        let (Some(ready), Some(elements), Rows::Stored(x)) = (self.ready, Elements::of(cx, *operands, b), a)
        else {
            return self.product.launch(cx, name, prepare);
        };
        let (lead, rows, least) = (dims.len() - 2, &dims[dims.len() - 2], ready.library.rows);
        let packed = || {
            ready
                .packed
                .as_ref()
                .map(|o| Operand { dims: vec![rows.clone(), o.dims[1].clone()], ..o.clone() })
        };
        let stored = || in_words(cx, x).then(|| (*x).clone());
        let a = if elements == Elements::Brains { packed() } else { stored() };
        let flat: Option<Vec<Operand>> = a.iter().chain(*b).map(|o| flat(o, lead)).collect();
        let Some([a, b @ ..]) = flat.as_deref().filter(|all| all.len() > b.len()) else {
            return self.product.launch(cx, name, prepare);
        };
        let begun = cx.launches.len();
        if rows.when(0, least - 1, rows.clone()).is_some() {
            self.product.launch(cx, name, prepare)?;
        }
        for mut launch in cx.launches.split_off(begun) {
            // A form of more rows than are left to it would be compiled in vain.
            let never =
                matches!(&launch.programs, Amount::When { of, from, .. } if **of == *rows && *from >= least);
            if let Some(programs) = rows.when(0, least - 1, launch.programs.clone()).filter(|_| !never) {
                launch.programs = programs;
                cx.launches.push(launch);
            }
        }
        if rows.when(least, usize::MAX, rows.clone()).is_none() {
            return Ok(());
        }
        let result = |to: &Operand| flat_result(to, lead);
        if let Some(plain) = self.plain.as_ref().filter(|plain| plain.is_taken(cx))
            && let Some(to) = result(plain.to)
        {
            let added = Plain { to: &to, ..*plain };
            return multiply(cx, elements, ready, [a, &b[0]], rows, &added);
        }
        let mut room = ready.room.clone();
        let mut take = || room.take_from(DType::F32, dims, rows, least);
        let sums: Vec<Operand> = b.iter().map(|_| take()).collect();
        cx.scratch.push(room.words());
        for (b, to) in b.iter().zip(&sums) {
            let to = result(to).ok_or_else(|| cx.mismatched())?;
            multiply(cx, elements, ready, [a, b], rows, &Plain { to: &to, bias: None, residual: None })?;
        }
        self.finish(cx, name, rows, least, &sums, prepare)
    }

    /// Adds the launch that finishes sums, a lane an element.
    fn finish(
        &self,
        cx: &mut LowerCx<'_>,
        name: &str,
        rows: &Amount,
        least: usize,
        sums: &[Operand],
        prepare: &dyn Fn(&mut Draft<'_>) -> Box<Finish<'static>>,
    ) -> Result<(), BackendError> {
        let dims = self.product.dims;
        let mut d = cx.draft(format!("{name}_finish"));
        let finish = prepare(&mut d);
        let linear = d.linear();
        let (at, inside) = d.coordinates(linear, dims);
        let views: Vec<ViewId> = sums.iter().map(|o| d.read(o)).collect();
        let values: Vec<Value> = views.iter().map(|&view| d.b.load(view, &at, Some(inside))).collect();
        finish(&mut d, &at, inside, &values);
        let programs = Amount::product(dims).ceil_div(LANES as usize);
        match rows.when(least, usize::MAX, programs) {
            Some(programs) => cx.launch(d, programs),
            None => Ok(()),
        }
    }
}

/// An operand whose lead axes are one, or none where there are none.
fn flat(operand: &Operand, lead: usize) -> Option<Operand> {
    let kept = |axis: &usize| !operand.dims[*axis].is_one();
    let axes: Vec<usize> = (0..lead).filter(kept).collect();
    let none = Amount::Known(0);
    for pair in axes.windows(2) {
        let next = Amount::product([&operand.dims[pair[1]], &operand.strides[pair[1]]]);
        let still = operand.strides[pair[0]] == none && operand.strides[pair[1]] == none;
        if operand.strides[pair[0]] != next && !still {
            return None;
        }
    }
    let (mut dims, mut strides) = (Vec::new(), Vec::new());
    if let Some(&last) = axes.last() {
        dims.push(Amount::product(axes.iter().map(|&axis| &operand.dims[axis])));
        strides.push(operand.strides[last].clone());
    }
    let rest = operand.dims.len() - 2;
    let one = operand.strides[rest..].iter().filter(|stride| stride.is_one()).count() == 1;
    dims.extend_from_slice(&operand.dims[rest..]);
    strides.extend_from_slice(&operand.strides[rest..]);
    one.then_some(Operand { dims, strides, ..operand.clone() })
}

/// A result as [`flat`], whose rows follow each other.
fn flat_result(to: &Operand, lead: usize) -> Option<Operand> {
    flat(to, lead).filter(|to| to.strides.last().is_some_and(Amount::is_one))
}

/// A word's two bfloat16.
fn halves(d: &mut Draft<'_>, word: Value) -> [Value; 2] {
    let (up, mask) = (d.b.int(1 << 16), d.b.int(-1 << 16));
    let (low, high) = (d.b.mul(word, up), d.b.binary(BinaryFn::And, word, mask));
    [low, high].map(|bits| d.b.unary(UnaryFn::FromBits, bits))
}

/// Adds the launch of a product whose kernel a library's call stands for.
fn multiply(
    cx: &mut LowerCx<'_>,
    elements: Elements,
    ready: &Ready,
    [a, b]: [&Operand; 2],
    rows: &Amount,
    Plain { to, bias, residual }: &Plain<'_>,
) -> Result<(), BackendError> {
    let mut d = cx.draft(elements.name());
    let along = a.dims.len() - 1;
    let (a_view, b_view) = match elements {
        Elements::Floats => (d.read(a), d.read(b)),
        Elements::Brains => {
            let mut words = b.clone();
            let halved = [&mut words.dims[along], &mut words.strides[along - 1]];
            halved.into_iter().for_each(|amount| *amount = amount.ceil_div(2));
            (d.words(a), d.words(&words))
        }
    };
    let vector = |o: &Operand| Operand { dims: vec![to.dims[along].clone()], ..o.clone() };
    let bias = bias.map(|o| d.read(&vector(o)));
    let addend = residual.map(|o| d.read(o));
    let (result, workspace) = (d.write(to), d.write(&ready.workspace));
    let linear = d.linear();
    let (at, inside) = d.coordinates(linear, &to.dims);
    let k = d.size(&a.dims[along]);
    let (zero, first, end) = (d.b.float(0.0), d.b.int(0), d.b.arg(k));
    let (lead, row, column) = (&at[..along - 1], at[along - 1], at[along]);
    let sums = d.repeat([first, end], 1, &[zero], |d, p, sums| {
        let line = |own: Value| lead.iter().copied().chain([own, p]).collect::<Vec<_>>();
        let x = d.b.load(a_view, &line(row), Some(inside));
        let w = d.b.load(b_view, &line(column), Some(inside));
        let sum = match elements {
            Elements::Floats => d.b.fma(x, w, sums[0]),
            Elements::Brains => {
                let (x, w) = (halves(d, x), halves(d, w));
                let sum = d.b.fma(x[0], w[0], sums[0]);
                d.b.fma(x[1], w[1], sum)
            }
        };
        vec![sum]
    });
    let mut y = sums[0];
    if let Some(view) = bias {
        let more = d.b.load(view, &[column], Some(inside));
        y = d.b.add(y, more);
    }
    if let Some(view) = addend {
        let more = d.b.load(view, &at, Some(inside));
        y = d.b.add(more, y);
    }
    d.b.store(result, &at, y, Some(inside));
    d.b.stands_for(Gemm { rows: a_view, columns: b_view, result, workspace, bias, addend });
    let programs = Amount::product(&to.dims).ceil_div(LANES as usize);
    match rows.when(ready.library.rows, usize::MAX, programs) {
        Some(programs) => cx.launch(d, programs),
        None => Ok(()),
    }
}
