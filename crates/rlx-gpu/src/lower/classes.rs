//! Kernels that are timed as one: alike in what decides which schedule is fast, and what may be chosen for each.

use super::operands::Operands;
use super::schedules::{Choice, FEW, LARGE_FROM, QUERIES, Schedule};
use super::{Amount, Operand, grouped, mma};
use rlx_graph::ops::attention::Attention;
use rlx_tensor::DType;
use std::fmt;
use std::str::FromStr;

/// A class of a family of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Class {
    Product(ProductClass),
    Attention(AttentionClass),
    Experts(ExpertsClass),
}

/// What products of weights multiply, as far as forms differ by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum By {
    Floats,
    Rounded,
    Units,
}

const BYS: [(&str, By); 3] = [("f32", By::Floats), ("bf16", By::Rounded), ("units", By::Units)];

impl By {
    fn name(self) -> &'static str {
        BYS.iter().find(|(_, by)| *by == self).map_or("", |(name, _)| name)
    }

    /// The operands of a trial.
    pub fn operands(self) -> Operands {
        match self {
            By::Floats => Operands::Floats,
            By::Rounded => Operands::Rounded,
            By::Units => Operands::Units { wave: 1 },
        }
    }
}

impl From<Operands> for By {
    fn from(operands: Operands) -> Self {
        match operands {
            Operands::Floats => By::Floats,
            Operands::Rounded => By::Rounded,
            Operands::Units { .. } => By::Units,
        }
    }
}

/// Products of alike weights, of a width and depth between the same powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ProductClass {
    /// One matrix, or gate and up.
    pub matrices: usize,
    pub dtype: DType,
    pub by: By,
    /// Powers of two that are not below columns and products of an element.
    pub columns: u32,
    pub depth: u32,
}

/// Attention with heads of one size, so many of which share keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AttentionClass {
    /// The cache's element type; `None` where keys are those of the run.
    pub cache: Option<DType>,
    pub group: usize,
    pub head_dim: usize,
    /// The power of two that is not below the heads of keys.
    pub kv_heads: u32,
}

/// Mixtures of experts of alike weights, of sizes between the same powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ExpertsClass {
    pub dtype: DType,
    pub by: By,
    /// Powers of two that are not below the inner width, the width, and the number of experts.
    pub inner: u32,
    pub width: u32,
    pub experts: u32,
    pub top_k: usize,
}

/// Sizes of products beyond this power of two are timed as it.
const LARGEST: u32 = 11;
/// So are those of experts, of which there are many.
const LARGEST_EXPERT: u32 = 10;
const MOST_EXPERTS: u32 = 4;
/// And heads of keys.
const MOST_HEADS: u32 = 3;
/// Heads that share keys, and elements of a head, at most.
const MOST_SHARED: usize = 64;
const WIDEST_HEAD: usize = 512;

fn power(n: usize, most: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros().min(most)
}

/// Rows and columns of a matrix; `None` for sizes that only a run knows.
fn known(matrix: &Operand) -> Option<[usize; 2]> {
    match matrix.dims.as_slice() {
        [Amount::Known(rows), Amount::Known(columns)] => Some([*rows, *columns]),
        _ => None,
    }
}

impl Class {
    /// Of a product with matrices `[columns, k]`.
    pub fn of_product(matrices: &[Operand], operands: Operands) -> Option<Class> {
        let first = matrices.first()?;
        let [columns, depth] = known(first)?.map(|n| power(n, LARGEST));
        let (matrices, dtype, by) = (matrices.len(), first.dtype, operands.into());
        Some(Class::Product(ProductClass { matrices, dtype, by, columns, depth }))
    }

    /// Of an attention over a cache of this type, or over the run's own keys. Caches of integers are not timed.
    pub fn of_attention(op: &Attention, cache: Option<DType>) -> Option<Class> {
        let floats = |dtype: &DType| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        let (group, head_dim) = (op.heads / op.kv_heads.max(1), op.head_dim);
        let class = AttentionClass { cache, group, head_dim, kv_heads: power(op.kv_heads, MOST_HEADS) };
        (cache.as_ref().is_none_or(floats) && class.is_known()).then_some(Class::Attention(class))
    }

    /// Of experts with matrices `[inner, width]` for gates.
    pub fn of_experts(gate: &Operand, experts: usize, top_k: usize, operands: Operands) -> Option<Class> {
        let [inner, width] = known(gate)?.map(|n| power(n, LARGEST_EXPERT));
        let (dtype, by, experts) = (gate.dtype, operands.into(), power(experts, MOST_EXPERTS));
        Some(Class::Experts(ExpertsClass {
            dtype,
            by,
            inner,
            width,
            experts,
            top_k: top_k.min(1 << experts),
        }))
    }

    /// What is tried, each with the form for few as far as it goes.
    pub fn candidates(self) -> Vec<Choice> {
        let few = self.fews().first().copied().unwrap_or(0);
        let of =
            |schedules: Vec<usize>| schedules.into_iter().map(|schedule| Choice { schedule, few }).collect();
        match self {
            Class::Product(ProductClass { by: By::Units, .. }) => of((0..LARGE_FROM.len()).collect()),
            Class::Product(product) => of(Schedule::fitting(product.matrices).collect()),
            Class::Attention(_) => of((0..QUERIES.len()).collect()),
            Class::Experts(ExpertsClass { by: By::Units, .. }) => of(vec![0]),
            Class::Experts(_) => {
                let block = |at: &usize| Schedule::TABLE[*at].rows == grouped::BLOCK;
                of(Schedule::fitting(2).filter(block).collect())
            }
        }
    }

    /// Numbers of rows up to which the form for few is tried, the most first.
    pub fn fews(self) -> &'static [usize] {
        const ALL: [usize; 4] = [FEW, 4, 2, 1];
        const UNITS: [usize; 2] = [mma::FEW[1] as usize, mma::FEW[0] as usize];
        match self {
            Class::Product(ProductClass { by: By::Units, .. }) => &UNITS,
            Class::Attention(AttentionClass { cache: None, .. }) => &[],
            _ => &ALL,
        }
    }

    /// Numbers of rows that schedules are compared for.
    pub fn rows(self) -> &'static [usize] {
        match self {
            Class::Product(ProductClass { by: By::Units, .. }) => &[2048, 512, 128],
            _ => &[64],
        }
    }

    /// Whether kernels of the class may run so.
    #[cfg(any(feature = "wgpu", feature = "cuda", test))]
    pub fn takes(self, choice: Choice) -> bool {
        let same = |known: &Choice| known.schedule == choice.schedule;
        choice.few <= self.fews().first().copied().unwrap_or(0) && self.candidates().iter().any(same)
    }

    /// A schedule in words.
    pub fn schedule_told(self, schedule: usize) -> String {
        match self {
            Class::Product(ProductClass { by: By::Units, .. }) => match LARGE_FROM.get(schedule) {
                Some(&from) if from < usize::MAX => format!("128 x 128 from {from} rows"),
                _ => "64 x 64".to_owned(),
            },
            Class::Experts(ExpertsClass { by: By::Units, .. }) => "32 x 64".to_owned(),
            Class::Product(_) | Class::Experts(_) => Schedule::TABLE
                .get(schedule)
                .map_or_else(String::new, |of| format!("{} x {} by {}", of.rows, of.columns, of.depth)),
            Class::Attention(_) => {
                let queries = QUERIES.get(schedule).copied().unwrap_or(0);
                format!("{queries} rows times heads")
            }
        }
    }

    /// The word that its lines begin with.
    pub fn family(self) -> &'static str {
        match self {
            Class::Product(_) => "product",
            Class::Attention(_) => "attention",
            Class::Experts(_) => "experts",
        }
    }
}

impl ProductClass {
    /// Columns and products of an element that stand for it.
    pub fn dims(self) -> [usize; 2] {
        [1 << self.columns, (1usize << self.depth).next_multiple_of(self.dtype.block().0)]
    }
}

impl AttentionClass {
    fn is_known(self) -> bool {
        (1..=MOST_SHARED).contains(&self.group)
            && (1..=WIDEST_HEAD).contains(&self.head_dim)
            && self.kv_heads <= MOST_HEADS
    }
}

impl ExpertsClass {
    /// The inner width, the width and the number of experts that stand for it.
    pub fn dims(self) -> [usize; 3] {
        let blocks = |n: u32| (1usize << n).next_multiple_of(self.dtype.block().0);
        [blocks(self.inner), blocks(self.width), 1 << self.experts]
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = self.family();
        match self {
            Class::Product(ProductClass { matrices, dtype, by, columns, depth }) => {
                write!(f, "{family} {matrices} {dtype} {} {columns} {depth}", by.name())
            }
            Class::Attention(AttentionClass { cache, group, head_dim, kv_heads }) => {
                let cache = cache.map_or_else(|| "none".to_owned(), |dtype| dtype.to_string());
                write!(f, "{family} {cache} {group} {head_dim} {kv_heads}")
            }
            Class::Experts(ExpertsClass { dtype, by, inner, width, experts, top_k }) => {
                write!(f, "{family} {dtype} {} {inner} {width} {experts} {top_k}", by.name())
            }
        }
    }
}

impl FromStr for Class {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        fn number<T: FromStr>(word: &str) -> Result<T, ()> {
            word.parse().map_err(drop)
        }
        let by = |word: &str| BYS.iter().find(|(name, _)| *name == word).map(|(_, by)| *by).ok_or(());
        let dtype = |word: &str| word.parse::<DType>().map_err(drop);
        let words: Vec<&str> = text.split(' ').collect();
        let (class, known) = match words.as_slice() {
            ["product", matrices, of, how, columns, depth] => {
                let (matrices, dtype, by) = (number(matrices)?, dtype(of)?, by(how)?);
                let (columns, depth) = (number(columns)?, number(depth)?);
                let known = (1..=2).contains(&matrices) && columns <= LARGEST && depth <= LARGEST;
                (Class::Product(ProductClass { matrices, dtype, by, columns, depth }), known)
            }
            ["attention", cache, group, head_dim, kv_heads] => {
                let cache = if *cache == "none" { None } else { Some(dtype(cache)?) };
                let (group, head_dim, kv_heads) = (number(group)?, number(head_dim)?, number(kv_heads)?);
                let class = AttentionClass { cache, group, head_dim, kv_heads };
                (Class::Attention(class), class.is_known())
            }
            ["experts", of, how, inner, width, experts, top_k] => {
                let (dtype, by, top_k) = (dtype(of)?, by(how)?, number(top_k)?);
                let (inner, width, experts) = (number(inner)?, number(width)?, number(experts)?);
                let small = inner <= LARGEST_EXPERT && width <= LARGEST_EXPERT && experts <= MOST_EXPERTS;
                let known = small && (1..=1usize << experts).contains(&top_k);
                (Class::Experts(ExpertsClass { dtype, by, inner, width, experts, top_k }), known)
            }
            _ => return Err(()),
        };
        if known { Ok(class) } else { Err(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_read_as_it_is_written() {
        let (dtype, by) = (DType::Q4_K, By::Floats);
        let product = ProductClass { matrices: 2, dtype, by, columns: 9, depth: 11 };
        let attention = AttentionClass { cache: Some(DType::F16), group: 7, head_dim: 64, kv_heads: 1 };
        let experts = ExpertsClass { dtype, by: By::Units, inner: 9, width: 10, experts: 3, top_k: 2 };
        assert_eq!((product.dims(), experts.dims()), ([512, 2048], [512, 1024, 8]));
        for (class, text) in [
            (Class::Product(product), "product 2 Q4_K f32 9 11"),
            (Class::Attention(attention), "attention f16 7 64 1"),
            (Class::Attention(AttentionClass { cache: None, ..attention }), "attention none 7 64 1"),
            (Class::Experts(experts), "experts Q4_K units 9 10 3 2"),
        ] {
            assert_eq!(class.to_string(), text);
            assert_eq!(text.parse(), Ok(class));
        }
        for wrong in [
            "",
            "product",
            "product 3 f32 f32 1 1",
            "product 1 f33 f32 1 1",
            "product 1 f32 f16 1 1",
            "product 1 f32 f32 1 60",
            "product 1 f32 f32 1 1 1",
            "attention f32 0 64 1",
            "attention f32 1 64 9",
            "experts f32 f32 1 1 2 5",
            "experts f32 f32 1 70 2 1",
        ] {
            assert_eq!(wrong.parse::<Class>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn what_shapes_decide_is_among_the_candidates() {
        for matrices in [1, 2] {
            let class =
                |by| Class::Product(ProductClass { matrices, dtype: DType::F32, by, columns: 3, depth: 5 });
            for columns in [8, 65, 4096] {
                let choice = Choice::by_shape(&Amount::Known(columns), matrices);
                assert!(class(By::Floats).takes(choice), "{choice:?}");
            }
            assert!(!class(By::Floats).takes(Choice { schedule: 99, few: 0 }));
            assert!(!class(By::Floats).takes(Choice { schedule: 0, few: 9 }));
            assert!(class(By::Units).takes(Choice { schedule: 3, few: 16 }));
        }
    }
}
