//! Weights of codes as their kernels read them.

use crate::aligned::AlignedBuf;
use crate::isa::LANES;
use crate::pool::Pool;
use crate::quant_dot::dot::DotSet;
use std::fmt;
use std::sync::Arc;

/// Inputs in a 32-bit word.
pub(super) const WORD: usize = 4;

/// Bytes of a word of each column of a strip.
pub(super) const STRIP_WORD_BYTES: usize = WORD * LANES;

/// Where the code of an output and an input stands among the bytes of a weight.
///
/// Inputs are counted `outer * inner + inner index`, as a window's elements and its channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodeOrder {
    /// Outputs.
    pub n: usize,
    /// How often the inner inputs repeat.
    pub outer: usize,
    /// Inputs that follow each other.
    pub inner: usize,
    /// Bytes from one output, one outer and one inner input to the next.
    pub steps: [usize; 3],
}

impl CodeOrder {
    /// A matrix `[n, k]`, or `[k, n]` if `transposed`.
    pub fn matrix(n: usize, k: usize, transposed: bool) -> Self {
        let steps = if transposed { [1, 0, n] } else { [k, 0, 1] };
        CodeOrder { n, outer: 1, inner: k, steps }
    }

    /// Windows `[n, channels, taps]`.
    pub fn windows(n: usize, channels: usize, taps: usize) -> Self {
        CodeOrder { n, outer: taps, inner: channels, steps: [channels * taps, 1, taps] }
    }

    /// Inputs of an output.
    pub fn k(&self) -> usize {
        self.outer * self.inner
    }
}

/// Packed codes: panels of columns, words of four inputs a strip of 16 columns; then, for all columns, the sums of their codes and what
/// their zero points are. Codes are signed bytes; unsigned ones are moved by 128, as are their zero points.
#[derive(Clone)]
pub struct IntegerMatrix {
    buffer: Arc<AlignedBuf>,
    n: usize,
    k: usize,
    words: usize,
    strips: usize,
    set: DotSet,
    has_zeros: bool,
}

impl fmt::Debug for IntegerMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, k, set) = (self.n, self.k, self.set);
        f.debug_struct("IntegerMatrix")
            .field("n", &n)
            .field("k", &k)
            .field("set", &set)
            .finish_non_exhaustive()
    }
}

/// Bytes of a packed matrix whose rows are of whole words; `None` if they are too many.
pub(super) fn packed_bytes(n: usize, row_bytes: usize, strips: usize) -> Option<usize> {
    let columns = n.checked_next_multiple_of(strips * LANES)?;
    columns.checked_mul(row_bytes)?.checked_add(columns * 2 * size_of::<i32>())
}

struct Shared(*mut u8);

// SAFETY: each panel and its columns' numbers are written by the one worker that claimed it.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

impl IntegerMatrix {
    /// Packs codes, parts of `part` inputs from a word on each, signed or not, whose zero points are those of their outputs or one of all; none if they are 0. `None` if the sizes do not fit
    /// each other.
    pub(super) fn pack(
        pool: &Pool,
        set: DotSet,
        strips: usize,
        codes: &[u8],
        (order, part): (&CodeOrder, usize),
        (signed, zeros): (bool, &[i32]),
    ) -> Option<IntegerMatrix> {
        let (n, k) = (order.n, order.k());
        if codes.len() != n.checked_mul(k)? || !(zeros.len() <= 1 || zeros.len() == n) {
            return None;
        }
        let part_bytes = part.next_multiple_of(WORD);
        let row_bytes = k.checked_div(part)?.checked_mul(part_bytes)?;
        let mut buffer = AlignedBuf::zeroed(packed_bytes(n, row_bytes, strips)?)?;
        let (words, columns) = (row_bytes / WORD, strips * LANES);
        let panels = n.div_ceil(columns);
        let numbers = panels * columns * words * WORD;
        let (flip, moved) = if signed { (0u8, 0) } else { (0x80, 128) };
        let out = Shared(buffer.bytes_mut().as_mut_ptr());
        let pack_column = |column: usize| {
            let (panel, lane) = (column / columns, column % columns);
            let start = (panel * words * strips + lane / LANES) * STRIP_WORD_BYTES + lane % LANES * WORD;
            let mut sum = 0i32;
            for outer in 0..order.outer {
                let from = column * order.steps[0] + outer * order.steps[1];
                for inner in 0..order.inner {
                    let code = codes[from + inner * order.steps[2]] ^ flip;
                    let input = outer * order.inner + inner;
                    let byte = input / part * part_bytes + input % part;
                    let at = start + byte / WORD * strips * STRIP_WORD_BYTES + byte % WORD;
                    // SAFETY: the place is of this column's panel, which this worker alone writes.
                    unsafe { out.at(at).write(code) };
                    sum = sum.wrapping_add(i32::from(code as i8));
                }
            }
            let zero = zeros.get(column).or(zeros.first()).copied().unwrap_or(0) - moved;
            let totals: *mut i32 = out.at(numbers).cast();
            // SAFETY: both numbers are this column's; the buffer has two for each.
            unsafe {
                totals.add(column).write(sum);
                totals.add(panels * columns + column).write(zero);
            }
        };
        pool.run(|team| {
            for panel in team.tiles(panels) {
                (panel * columns..n.min((panel + 1) * columns)).for_each(pack_column);
            }
        });
        let zero = |column: usize| zeros.get(column).or(zeros.first()).copied().unwrap_or(0) - moved;
        let has_zeros = (0..n).any(|column| zero(column) != 0);
        Some(IntegerMatrix { buffer: Arc::new(buffer), n, k, words, strips, set, has_zeros })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether some zero point is not 0 once codes are signed.
    pub fn has_zeros(&self) -> bool {
        self.has_zeros
    }

    pub(super) fn set(&self) -> DotSet {
        self.set
    }

    pub(super) fn words(&self) -> usize {
        self.words
    }

    pub(super) fn panel_columns(&self) -> usize {
        self.strips * LANES
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(self.panel_columns())
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.buffer.as_ref().as_ref().len()
    }

    /// The codes of a panel.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        let bytes = self.words() * self.strips * STRIP_WORD_BYTES;
        self.buffer.as_ref().as_ref()[panel * bytes..].as_ptr()
    }

    /// The codes of the panel behind one; none behind the last.
    pub(super) fn codes_behind(&self, panel: usize) -> &[u8] {
        let bytes = self.words() * self.strips * STRIP_WORD_BYTES;
        let end = if panel + 1 < self.panels() { (panel + 2) * bytes } else { (panel + 1) * bytes };
        &self.buffer.as_ref().as_ref()[(panel + 1) * bytes..end]
    }

    /// Sums and zero points of a panel's columns.
    pub(super) fn numbers(&self, panel: usize) -> (&[i32], &[i32]) {
        let columns = self.panel_columns();
        let start = self.panels() * columns * self.words() * WORD;
        let all: &[u8] = self.buffer.as_ref().as_ref();
        // SAFETY: behind the codes, whose bytes are a multiple of 64, stand two numbers for each column.
        let numbers = unsafe {
            std::slice::from_raw_parts(all[start..].as_ptr().cast::<i32>(), 2 * self.panels() * columns)
        };
        let (sums, zeros) = numbers.split_at(self.panels() * columns);
        let own = panel * columns..(panel + 1) * columns;
        (&sums[own.clone()], &zeros[own])
    }
}
