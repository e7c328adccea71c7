//! Symbolic dims: integer polynomials over named symbols, with floor/ceil division, minimum and maximum as atoms.
//!
//! An expression is kept in normal form (terms sorted, like terms joined, no zero terms), so structural equality decides
//! equality of polynomials. Where two expressions differ in form but may agree in value, [`Dim::compare`] says `Unknown` and
//! the caller turns the equality into a run-time check.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Add, Mul, Sub};
use std::sync::Arc;

/// The name of a size that is known only when a graph is specialised or run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Symbol(Arc<str>);

impl Symbol {
    /// A symbol of this name.
    pub fn new(name: impl AsRef<str>) -> Self {
        Self(Arc::from(name.as_ref()))
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A tensor's extent along one axis: a number or an expression over symbols.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    /// A number.
    Known(usize),
    /// A polynomial in normal form that is not a number.
    Expr(Arc<Poly>),
}

/// A sum of terms in normal form: sorted by factors, no two terms with the same factors, no zero coefficients.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Poly {
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Term {
    factors: Vec<Atom>,
    coeff: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Atom {
    Symbol(Symbol),
    FloorDiv(Dim, Dim),
    CeilDiv(Dim, Dim),
    Min(Dim, Dim),
    Max(Dim, Dim),
}

/// Whether two dims are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DimOrder {
    /// Equal for every binding.
    Equal,
    /// Different for every binding.
    Different,
    /// Depends on the binding: a run-time check.
    Unknown,
}

/// Why an expression has no value under a binding.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DimError {
    /// A symbol has no value.
    #[error("symbol {symbol} is not bound (in {expr})")]
    Unbound {
        /// The symbol.
        symbol: Symbol,
        /// The expression that needs it.
        expr: String,
    },
    /// The value does not fit, or is negative.
    #[error("{expr} has no valid size under this binding (value {value})")]
    OutOfRange {
        /// The expression.
        expr: String,
        /// Its value.
        value: i128,
    },
    /// Division by zero.
    #[error("{expr} divides by zero under this binding")]
    DivideByZero {
        /// The expression.
        expr: String,
    },
    /// A symbol was bound twice to different values.
    #[error("symbol {symbol} is bound to {first} and to {second}")]
    Conflict {
        /// The symbol.
        symbol: Symbol,
        /// The value it had.
        first: usize,
        /// The value it was given next.
        second: usize,
    },
    /// Text that is no dim expression.
    #[error("cannot read {text:?} as a dim: {reason}")]
    Syntax {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Values of symbols.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct DimBinding {
    values: BTreeMap<Symbol, usize>,
}

impl DimBinding {
    /// No symbol bound.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same binding with one symbol more (or given a new value).
    #[must_use]
    pub fn with(mut self, name: &str, value: usize) -> Self {
        self.values.insert(Symbol::new(name), value);
        self
    }

    /// Binds a symbol; binding it again to another value is a [`DimError::Conflict`].
    pub fn bind(&mut self, symbol: &Symbol, value: usize) -> Result<(), DimError> {
        match self.values.get(symbol) {
            Some(&first) if first != value => {
                Err(DimError::Conflict { symbol: symbol.clone(), first, second: value })
            }
            Some(_) => Ok(()),
            None => {
                self.values.insert(symbol.clone(), value);
                Ok(())
            }
        }
    }

    /// The value of a symbol.
    pub fn value(&self, symbol: &Symbol) -> Option<usize> {
        self.values.get(symbol).copied()
    }

    /// Symbols and values, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Symbol, usize)> {
        self.values.iter().map(|(s, &v)| (s, v))
    }

    /// Number of bound symbols.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// True if nothing is bound.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

impl Dim {
    /// A dim that is one symbol.
    pub fn symbol(name: impl AsRef<str>) -> Self {
        Self::atom(Atom::Symbol(Symbol::new(name)))
    }

    /// The number, where this is one.
    pub fn known(&self) -> Option<usize> {
        match self {
            Dim::Known(value) => Some(*value),
            Dim::Expr(_) => None,
        }
    }

    /// The symbol, where this is exactly one symbol.
    pub fn as_symbol(&self) -> Option<&Symbol> {
        let Dim::Expr(poly) = self else { return None };
        match poly.terms.as_slice() {
            [Term { coeff: 1, factors }] => match factors.as_slice() {
                [Atom::Symbol(symbol)] => Some(symbol),
                _ => None,
            },
            _ => None,
        }
    }

    /// The symbol and the number added to it, where this is one symbol plus a number (or alone).
    pub fn as_symbol_plus(&self) -> Option<(&Symbol, usize)> {
        let Dim::Expr(poly) = self else { return None };
        let (offset, term) = match poly.terms.as_slice() {
            [term] => (0, term),
            [Term { factors, coeff }, term] if factors.is_empty() => (usize::try_from(*coeff).ok()?, term),
            _ => return None,
        };
        match (term.coeff, term.factors.as_slice()) {
            (1, [Atom::Symbol(symbol)]) => Some((symbol, offset)),
            _ => None,
        }
    }

    /// `ceil(self / divisor)`.
    #[must_use]
    pub fn ceil_div(&self, divisor: impl Into<Dim>) -> Dim {
        let divisor = divisor.into();
        match (self, &divisor) {
            (Dim::Known(a), Dim::Known(b)) if *b != 0 => Dim::Known(a.div_ceil(*b)),
            (_, Dim::Known(1)) => self.clone(),
            _ => self
                .exact_quotient(&divisor)
                .unwrap_or_else(|| Dim::atom(Atom::CeilDiv(self.clone(), divisor))),
        }
    }

    /// `floor(self / divisor)`.
    #[must_use]
    pub fn floor_div(&self, divisor: impl Into<Dim>) -> Dim {
        let divisor = divisor.into();
        match (self, &divisor) {
            (Dim::Known(a), Dim::Known(b)) if *b != 0 => Dim::Known(a / b),
            (_, Dim::Known(1)) => self.clone(),
            _ => self
                .exact_quotient(&divisor)
                .unwrap_or_else(|| Dim::atom(Atom::FloorDiv(self.clone(), divisor))),
        }
    }

    /// The smaller of two dims.
    #[must_use]
    pub fn minimum(&self, other: impl Into<Dim>) -> Dim {
        self.extremum(other.into(), usize::min, Atom::Min)
    }

    /// The larger of two dims.
    #[must_use]
    pub fn maximum(&self, other: impl Into<Dim>) -> Dim {
        self.extremum(other.into(), usize::max, Atom::Max)
    }

    fn extremum(&self, other: Dim, known: fn(usize, usize) -> usize, atom: fn(Dim, Dim) -> Atom) -> Dim {
        match (self, &other) {
            (Dim::Known(a), Dim::Known(b)) => Dim::Known(known(*a, *b)),
            _ if *self == other => other,
            _ if *self < other => Dim::atom(atom(self.clone(), other)),
            _ => Dim::atom(atom(other, self.clone())),
        }
    }

    /// `self / divisor` where every term is a multiple of a single-term divisor.
    fn exact_quotient(&self, divisor: &Dim) -> Option<Dim> {
        let (numerator, denominator) = (self.poly(), divisor.poly());
        let [by] = denominator.terms.as_slice() else { return None };
        let mut terms = Vec::with_capacity(numerator.terms.len());
        for term in &numerator.terms {
            if term.coeff.checked_rem(by.coeff)? != 0 {
                return None;
            }
            let mut factors = term.factors.clone();
            for factor in &by.factors {
                let at = factors.iter().position(|f| f == factor)?;
                factors.remove(at);
            }
            terms.push(Term { factors, coeff: term.coeff / by.coeff });
        }
        Some(Poly::from_terms(terms).into_dim())
    }

    /// Whether two dims are equal, if form alone decides it.
    pub fn compare(&self, other: &Dim) -> DimOrder {
        if self == other {
            return DimOrder::Equal;
        }
        match Poly::sum(&self.poly(), &other.poly(), -1).terms.as_slice() {
            [] => DimOrder::Equal,
            [Term { factors, .. }] if factors.is_empty() => DimOrder::Different,
            _ => DimOrder::Unknown,
        }
    }

    /// The value under a binding.
    pub fn eval(&self, binding: &DimBinding) -> Result<usize, DimError> {
        match self {
            Dim::Known(value) => Ok(*value),
            Dim::Expr(_) => self.eval_with(&|symbol| binding.value(symbol)),
        }
    }

    /// The value, with symbols looked up by a function.
    pub fn eval_with(&self, lookup: &dyn Fn(&Symbol) -> Option<usize>) -> Result<usize, DimError> {
        let value = self.eval_wide(lookup)?;
        usize::try_from(value).map_err(|_| DimError::OutOfRange { expr: self.to_string(), value })
    }

    fn eval_wide(&self, lookup: &dyn Fn(&Symbol) -> Option<usize>) -> Result<i128, DimError> {
        let poly = match self {
            Dim::Known(value) => return Ok(*value as i128),
            Dim::Expr(poly) => poly,
        };
        let overflow = || DimError::OutOfRange { expr: self.to_string(), value: i128::MAX };
        let mut total = 0i128;
        for term in &poly.terms {
            let mut product = i128::from(term.coeff);
            for factor in &term.factors {
                let value = factor.eval(self, lookup)?;
                product = product.checked_mul(value).ok_or_else(overflow)?;
            }
            total = total.checked_add(product).ok_or_else(overflow)?;
        }
        Ok(total)
    }

    /// Adds every symbol in this dim to `into`.
    pub fn collect_symbols(&self, into: &mut BTreeSet<Symbol>) {
        let Dim::Expr(poly) = self else { return };
        for atom in poly.terms.iter().flat_map(|t| &t.factors) {
            match atom {
                Atom::Symbol(symbol) => {
                    into.insert(symbol.clone());
                }
                Atom::FloorDiv(a, b) | Atom::CeilDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
                    a.collect_symbols(into);
                    b.collect_symbols(into);
                }
            }
        }
    }

    /// The same expression with symbols replaced.
    #[must_use]
    pub fn substitute(&self, replace: &dyn Fn(&Symbol) -> Option<Dim>) -> Dim {
        let Dim::Expr(poly) = self else { return self.clone() };
        let mut sum = Dim::Known(0);
        for term in &poly.terms {
            let mut product = Poly::constant(term.coeff).into_dim();
            for factor in &term.factors {
                product = &product * &factor.substitute(replace);
            }
            sum = &sum + &product;
        }
        sum
    }

    fn atom(atom: Atom) -> Dim {
        Poly { terms: vec![Term { factors: vec![atom], coeff: 1 }] }.into_dim()
    }

    fn poly(&self) -> Arc<Poly> {
        match self {
            Dim::Known(value) => Arc::new(Poly::constant(i64::try_from(*value).unwrap_or(i64::MAX))),
            Dim::Expr(poly) => Arc::clone(poly),
        }
    }
}

impl Atom {
    fn eval(&self, within: &Dim, lookup: &dyn Fn(&Symbol) -> Option<usize>) -> Result<i128, DimError> {
        let pair = |a: &Dim, b: &Dim| Ok::<_, DimError>((a.eval_wide(lookup)?, b.eval_wide(lookup)?));
        let nonzero = |(a, b)| match b {
            0 => Err(DimError::DivideByZero { expr: within.to_string() }),
            _ => Ok((a, b)),
        };
        match self {
            Atom::Symbol(symbol) => lookup(symbol)
                .map(|v| v as i128)
                .ok_or_else(|| DimError::Unbound { symbol: symbol.clone(), expr: within.to_string() }),
            Atom::FloorDiv(a, b) => nonzero(pair(a, b)?).map(|(a, b)| a.div_euclid(b)),
            Atom::CeilDiv(a, b) => nonzero(pair(a, b)?).map(|(a, b)| -(-a).div_euclid(b)),
            Atom::Min(a, b) => pair(a, b).map(|(a, b)| a.min(b)),
            Atom::Max(a, b) => pair(a, b).map(|(a, b)| a.max(b)),
        }
    }

    fn substitute(&self, replace: &dyn Fn(&Symbol) -> Option<Dim>) -> Dim {
        match self {
            Atom::Symbol(symbol) => replace(symbol).unwrap_or_else(|| Dim::atom(self.clone())),
            Atom::FloorDiv(a, b) => a.substitute(replace).floor_div(b.substitute(replace)),
            Atom::CeilDiv(a, b) => a.substitute(replace).ceil_div(b.substitute(replace)),
            Atom::Min(a, b) => a.substitute(replace).minimum(b.substitute(replace)),
            Atom::Max(a, b) => a.substitute(replace).maximum(b.substitute(replace)),
        }
    }
}

impl Poly {
    fn constant(value: i64) -> Self {
        match value {
            0 => Self::default(),
            _ => Self { terms: vec![Term { factors: Vec::new(), coeff: value }] },
        }
    }

    fn from_terms(mut terms: Vec<Term>) -> Self {
        terms.sort_by(|a, b| a.factors.cmp(&b.factors));
        let mut joined: Vec<Term> = Vec::with_capacity(terms.len());
        for term in terms {
            match joined.last_mut() {
                Some(last) if last.factors == term.factors => {
                    last.coeff = last.coeff.saturating_add(term.coeff);
                }
                _ => joined.push(term),
            }
        }
        joined.retain(|t| t.coeff != 0);
        Self { terms: joined }
    }

    fn sum(a: &Poly, b: &Poly, sign: i64) -> Poly {
        let negated =
            b.terms.iter().map(|t| Term { factors: t.factors.clone(), coeff: t.coeff.saturating_mul(sign) });
        Self::from_terms(a.terms.iter().cloned().chain(negated).collect())
    }

    fn product(a: &Poly, b: &Poly) -> Poly {
        let mut terms = Vec::with_capacity(a.terms.len() * b.terms.len());
        for x in &a.terms {
            for y in &b.terms {
                let mut factors = [x.factors.as_slice(), y.factors.as_slice()].concat();
                factors.sort();
                terms.push(Term { factors, coeff: x.coeff.saturating_mul(y.coeff) });
            }
        }
        Self::from_terms(terms)
    }

    fn into_dim(self) -> Dim {
        match self.terms.as_slice() {
            [] => Dim::Known(0),
            [Term { factors, coeff }] if factors.is_empty() && *coeff >= 0 => Dim::Known(*coeff as usize),
            _ => Dim::Expr(Arc::new(self)),
        }
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Self {
        Dim::Known(value)
    }
}

impl From<&Dim> for Dim {
    fn from(dim: &Dim) -> Self {
        dim.clone()
    }
}

impl From<Symbol> for Dim {
    fn from(symbol: Symbol) -> Self {
        Dim::atom(Atom::Symbol(symbol))
    }
}

/// A symbol of this name.
impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Dim::symbol(name)
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, |$a:ident, $b:ident| $body:expr) => {
        impl $trait<&Dim> for &Dim {
            type Output = Dim;
            fn $method(self, other: &Dim) -> Dim {
                let ($a, $b) = (self, other);
                $body
            }
        }
        impl<D: Into<Dim>> $trait<D> for Dim {
            type Output = Dim;
            fn $method(self, other: D) -> Dim {
                (&self).$method(&other.into())
            }
        }
    };
}

operator!(Add, add, |a, b| Poly::sum(&a.poly(), &b.poly(), 1).into_dim());
operator!(Sub, sub, |a, b| Poly::sum(&a.poly(), &b.poly(), -1).into_dim());
operator!(Mul, mul, |a, b| Poly::product(&a.poly(), &b.poly()).into_dim());

impl PartialEq<usize> for Dim {
    fn eq(&self, other: &usize) -> bool {
        self.known() == Some(*other)
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let poly = match self {
            Dim::Known(value) => return write!(f, "{value}"),
            Dim::Expr(poly) => poly,
        };
        for (i, term) in poly.terms.iter().enumerate() {
            let (sign, coeff) = (term.coeff < 0, term.coeff.unsigned_abs());
            match (i, sign) {
                (0, true) => write!(f, "-")?,
                (0, false) => {}
                (_, true) => write!(f, " - ")?,
                (_, false) => write!(f, " + ")?,
            }
            if coeff != 1 || term.factors.is_empty() {
                write!(f, "{coeff}")?;
            }
            for (j, factor) in term.factors.iter().enumerate() {
                if j > 0 || coeff != 1 {
                    write!(f, "*")?;
                }
                write!(f, "{factor}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Atom::Symbol(symbol) => write!(f, "{symbol}"),
            Atom::FloorDiv(a, b) => write!(f, "floor_div({a}, {b})"),
            Atom::CeilDiv(a, b) => write!(f, "ceil_div({a}, {b})"),
            Atom::Min(a, b) => write!(f, "min({a}, {b})"),
            Atom::Max(a, b) => write!(f, "max({a}, {b})"),
        }
    }
}

/// One level of a dim's structure.
pub(crate) enum DimView<'d> {
    Known(usize),
    Symbol(&'d Symbol),
    FloorDiv(&'d Dim, &'d Dim),
    CeilDiv(&'d Dim, &'d Dim),
    Min(&'d Dim, &'d Dim),
    Max(&'d Dim, &'d Dim),
    /// Coefficients with their factors.
    Sum(Vec<(i64, Vec<Dim>)>),
}

impl Dim {
    pub(crate) fn view(&self) -> DimView<'_> {
        let poly = match self {
            Dim::Known(value) => return DimView::Known(*value),
            Dim::Expr(poly) => poly,
        };
        if let [Term { coeff: 1, factors }] = poly.terms.as_slice()
            && let [atom] = factors.as_slice()
        {
            return match atom {
                Atom::Symbol(symbol) => DimView::Symbol(symbol),
                Atom::FloorDiv(a, b) => DimView::FloorDiv(a, b),
                Atom::CeilDiv(a, b) => DimView::CeilDiv(a, b),
                Atom::Min(a, b) => DimView::Min(a, b),
                Atom::Max(a, b) => DimView::Max(a, b),
            };
        }
        let factors = |term: &Term| term.factors.iter().map(|atom| Dim::atom(atom.clone())).collect();
        DimView::Sum(poly.terms.iter().map(|term| (term.coeff, factors(term))).collect())
    }
}

mod parse;

#[cfg(test)]
mod tests;
