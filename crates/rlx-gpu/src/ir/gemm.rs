//! Products that a library may compute in a kernel's place: the kernel says what is right, the call says it in the library's terms.

use super::{Binding, Kernel, Pairs, Storage, View, ViewId};
use std::fmt;

/// The views of a kernel that is `result = rows columns^T (+ bias) (+ addend)`, of floats or of words that hold two bfloat16, summed in
/// 32 bits. Views of matrices have two axes, or three whose first counts products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// `[.., m, k]`
    pub rows: ViewId,
    /// `[.., n, k]`
    pub columns: ViewId,
    /// `[.., m, n]`
    pub result: ViewId,
    /// Words that the library may use meanwhile; the kernel does not touch them.
    pub workspace: ViewId,
    /// `[n]`: added to each row.
    pub bias: Option<ViewId>,
    /// `[m, n]`
    pub addend: Option<ViewId>,
}

impl fmt::Display for Gemm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Gemm { rows, columns, result, workspace, bias, addend } = self;
        write!(f, "view{} = view{} x view{} in view{}", result.0, rows.0, columns.0, workspace.0)?;
        let added = [bias, addend].into_iter().flatten();
        added.into_iter().try_for_each(|view| write!(f, " + view{}", view.0))
    }
}

/// Words of a binding, from one on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spot {
    /// The binding.
    pub binding: Binding,
    /// The first word.
    pub word: usize,
}

/// A matrix of lines in memory. Distances count elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Matrix {
    /// Where it begins.
    pub spot: Spot,
    /// From a line to the next, or if it is turned, from an element of a line to the next.
    pub lead: usize,
    /// From a matrix to the next.
    pub apart: usize,
    /// Neighbours in memory are neighbours of two lines, not of one.
    pub turned: bool,
}

/// A [`Gemm`] under the arguments of a run.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GemmCall {
    /// Products at once.
    pub count: usize,
    /// Rows, columns, and products of an element.
    pub extents: [usize; 3],
    /// What two elements of a word of rows and columns are; floats of 32 bits if nothing.
    pub pairs: Option<Pairs>,
    /// The rows.
    pub rows: Matrix,
    /// The columns.
    pub columns: Matrix,
    /// The result.
    pub result: Matrix,
    /// What is added to it.
    pub addend: Option<Matrix>,
    /// What is added to each of its rows.
    pub bias: Option<Spot>,
    /// Memory for the library, and how many words.
    pub workspace: (Spot, usize),
}

/// A view as a matrix: its extents, and whether its words are pairs.
struct Seen {
    matrix: Matrix,
    count: usize,
    lines: usize,
    along: usize,
}

impl Gemm {
    /// The call for these arguments; `None` if the result has no elements.
    ///
    /// # Errors
    /// What of a view a library does not take.
    pub fn call(&self, kernel: &Kernel, arguments: &[i32]) -> Result<Option<GemmCall>, String> {
        let view = |id: ViewId| &kernel.views[id.0 as usize];
        // Rows that were packed stand as words, two elements each.
        let pairs = (view(self.rows).storage != view(self.result).storage).then_some(Pairs::Brain);
        let see =
            |id: ViewId, per: usize| seen(view(id), arguments, per).map_err(|e| format!("view{} {e}", id.0));
        let per = if pairs.is_some() { 2 } else { 1 };
        let (rows, columns, result) = (see(self.rows, per)?, see(self.columns, per)?, see(self.result, 1)?);
        let addend = self.addend.map(|id| see(id, 1)).transpose()?;
        let (m, n, k) = (rows.lines, columns.lines, rows.along);
        let agrees = |of: &Seen, lines: usize, along: usize| {
            of.count == rows.count && of.lines == lines && of.along == along
        };
        let added = addend.iter().all(|of| agrees(of, m, n) && !of.matrix.turned);
        if !agrees(&columns, n, k) || !agrees(&result, m, n) || result.matrix.turned || !added {
            return Err("extents of operands disagree".to_owned());
        }
        let spot = |id: ViewId| Spot { binding: view(id).binding, word: at(arguments, view(id).base) };
        let room = view(self.workspace).extents.iter().map(|&e| at(arguments, e)).product();
        let call = GemmCall {
            count: rows.count,
            extents: [m, n, k],
            pairs,
            rows: rows.matrix,
            columns: columns.matrix,
            result: result.matrix,
            addend: addend.map(|of| of.matrix),
            bias: self.bias.map(spot),
            workspace: (spot(self.workspace), room),
        };
        Ok((call.count * m * n > 0).then_some(call))
    }
}

fn at(arguments: &[i32], arg: super::Arg) -> usize {
    usize::try_from(arguments[arg.0 as usize]).unwrap_or(0)
}

/// A view of floats, or of words of `per` elements.
fn seen(view: &View, arguments: &[i32], per: usize) -> Result<Seen, &'static str> {
    let values = |list: &[super::Arg]| list.iter().map(|&arg| at(arguments, arg)).collect::<Vec<_>>();
    let (extents, strides) = (values(&view.extents), values(&view.strides));
    let (count, apart, [lines, along], [line, step]) = match (extents.as_slice(), strides.as_slice()) {
        ([lines, along], [line, step]) => (1, 0, [*lines, *along], [*line, *step]),
        ([count, lines, along], [apart, line, step]) => (*count, *apart, [*lines, *along], [*line, *step]),
        _ => return Err("is no matrix"),
    };
    if !matches!(view.storage, Storage::Word(_)) {
        return Err("does not stand in whole words");
    }
    let turned = step != 1;
    let (lead, least) = if turned { (step, lines) } else { (line, along) };
    if (turned && (line != 1 || per > 1)) || (lead < least && lines.max(along) > 1) {
        return Err("has no lines that follow each other");
    }
    let spot = Spot { binding: view.binding, word: at(arguments, view.base) };
    let matrix = Matrix { spot, lead: lead * per, apart: apart * per, turned };
    Ok(Seen { matrix, count, lines, along: along * per })
}

impl GemmCall {
    /// What a library chooses an algorithm by: all but where operands stand.
    pub fn shape(&self) -> GemmCall {
        let nowhere = Spot { binding: Binding::Arena, word: 0 };
        let matrix = |of: Matrix| Matrix { spot: nowhere, ..of };
        GemmCall {
            rows: matrix(self.rows),
            columns: matrix(self.columns),
            result: matrix(self.result),
            addend: self.addend.map(matrix),
            bias: self.bias.map(|_| nowhere),
            workspace: (nowhere, self.workspace.1),
            ..self.clone()
        }
    }
}
