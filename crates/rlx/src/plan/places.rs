//! Where values stand: buffers and places in them.

use rlx_tensor::{DType, SizeId, Tensor};
use std::fmt;

/// A buffer of a template.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub(crate) u32);

impl BufferId {
    pub(crate) fn from_index(index: usize) -> Self {
        Self(u32::try_from(index).unwrap_or(u32::MAX))
    }

    /// Position in the template's list; the executable's region number.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for BufferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

impl fmt::Debug for BufferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who owns a buffer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BufferKind {
    /// A range of the arena.
    Arena,
    /// The caller's input of this position.
    Input(usize),
    /// The caller's output of this position.
    Output(usize),
    /// The state of this position, owned by the caller.
    State(usize),
    /// The weight of this position, owned by the registry or the executable.
    Param(usize),
    /// A constant of the graph.
    Const(Tensor),
}

impl BufferKind {
    /// Whether both are of one owner and, for the caller's buffers, of one position.
    pub fn same_owner(&self, other: &BufferKind) -> bool {
        match (self, other) {
            (BufferKind::Input(a), BufferKind::Input(b))
            | (BufferKind::Output(a), BufferKind::Output(b))
            | (BufferKind::State(a), BufferKind::State(b))
            | (BufferKind::Param(a), BufferKind::Param(b)) => a == b,
            (BufferKind::Arena, BufferKind::Arena) | (BufferKind::Const(_), BufferKind::Const(_)) => true,
            _ => false,
        }
    }
}

/// A buffer: who owns it, how large it is, and between which steps it lives.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// Owner.
    pub kind: BufferKind,
    /// Size in bytes.
    pub bytes: SizeId,
    /// First step that writes it (arena buffers).
    pub first: usize,
    /// Last step that uses it (arena buffers).
    pub last: usize,
}

/// A value's place: a whole buffer, the same bytes under other dims, or some columns of its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// The buffer.
    pub buffer: BufferId,
    /// Elements from the buffer's start.
    pub offset: usize,
    /// Elements between rows (last dim), where the rows are not adjacent.
    pub stride: Option<usize>,
    /// Extents, outermost first.
    pub dims: Vec<SizeId>,
    /// Element type.
    pub dtype: DType,
}

impl Place {
    /// True if the place is its buffer's bytes from the start, in order.
    pub fn is_whole(&self) -> bool {
        self.offset == 0 && self.stride.is_none()
    }
}
