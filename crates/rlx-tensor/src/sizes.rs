//! Every size of a template in one flat table, evaluated in one pass without allocation.

use crate::dim::{DimError, DimView};
use crate::{Dim, Symbol};
use std::collections::HashMap;

/// An entry of a [`SizeTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SizeId(u32);

impl SizeId {
    /// Position in the table and in the values evaluated from it.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Clone)]
enum Entry {
    Known(usize),
    Symbol(usize),
    /// Coefficient, then a range of `factors`: entries multiplied.
    Sum(Vec<(i64, Vec<SizeId>)>),
    FloorDiv(SizeId, SizeId),
    CeilDiv(SizeId, SizeId),
    Min(SizeId, SizeId),
    Max(SizeId, SizeId),
}

/// Hash-consed size expressions over a list of symbols. An entry refers to earlier entries only.
#[derive(Debug, Clone, Default)]
pub struct SizeTable {
    symbols: Vec<Symbol>,
    entries: Vec<Entry>,
    dims: Vec<Dim>,
    ids: HashMap<Dim, SizeId>,
}

impl SizeTable {
    /// A table over these symbols; their order is the order of values given to [`SizeTable::eval`].
    pub fn new(symbols: impl IntoIterator<Item = Symbol>) -> Self {
        Self { symbols: symbols.into_iter().collect(), ..Self::default() }
    }

    /// The symbols, in the order their values are given.
    pub fn symbols(&self) -> &[Symbol] {
        &self.symbols
    }

    /// Position of a symbol.
    pub fn symbol_index(&self, symbol: &Symbol) -> Option<usize> {
        self.symbols.iter().position(|s| s == symbol)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Every entry, in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = SizeId> + use<> {
        (0..self.entries.len() as u32).map(SizeId)
    }

    /// The entry of a dim, if it is in the table.
    pub fn find(&self, dim: &Dim) -> Option<SizeId> {
        self.ids.get(dim).copied()
    }

    /// The expression of an entry.
    pub fn dim(&self, id: SizeId) -> &Dim {
        &self.dims[id.index()]
    }

    /// The number an entry is, if it has no symbols.
    pub fn known(&self, id: SizeId) -> Option<usize> {
        match self.entries[id.index()] {
            Entry::Known(value) => Some(value),
            _ => None,
        }
    }

    /// The entry of a dim, added if it is new. A symbol outside the table's list is [`DimError::Unbound`].
    pub fn intern(&mut self, dim: &Dim) -> Result<SizeId, DimError> {
        if let Some(&id) = self.ids.get(dim) {
            return Ok(id);
        }
        let entry = match dim.view() {
            DimView::Known(value) => Entry::Known(value),
            DimView::Symbol(symbol) => Entry::Symbol(
                self.symbol_index(symbol)
                    .ok_or_else(|| DimError::Unbound { symbol: symbol.clone(), expr: dim.to_string() })?,
            ),
            DimView::FloorDiv(a, b) => Entry::FloorDiv(self.intern(a)?, self.intern(b)?),
            DimView::CeilDiv(a, b) => Entry::CeilDiv(self.intern(a)?, self.intern(b)?),
            DimView::Min(a, b) => Entry::Min(self.intern(a)?, self.intern(b)?),
            DimView::Max(a, b) => Entry::Max(self.intern(a)?, self.intern(b)?),
            DimView::Sum(terms) => {
                let mut sum = Vec::with_capacity(terms.len());
                for (coeff, factors) in terms {
                    let factors: Result<Vec<SizeId>, DimError> =
                        factors.iter().map(|factor| self.intern(factor)).collect();
                    sum.push((coeff, factors?));
                }
                Entry::Sum(sum)
            }
        };
        let id = SizeId(u32::try_from(self.entries.len()).unwrap_or(u32::MAX));
        self.entries.push(entry);
        self.dims.push(dim.clone());
        self.ids.insert(dim.clone(), id);
        Ok(id)
    }

    /// Evaluates every entry into `values` (cleared first; it does not allocate once it has the capacity).
    ///
    /// `symbols` holds a value for each of [`SizeTable::symbols`]. A negative or overflowing size is an error.
    pub fn eval(&self, symbols: &[usize], values: &mut Vec<usize>) -> Result<(), DimError> {
        values.clear();
        for (entry, dim) in self.entries.iter().zip(&self.dims) {
            let at = |id: &SizeId| values[id.index()];
            let nonzero = |id: &SizeId| match at(id) {
                0 => Err(DimError::DivideByZero { expr: dim.to_string() }),
                value => Ok(value),
            };
            let value = match entry {
                Entry::Known(value) => *value,
                Entry::Symbol(index) => symbols.get(*index).copied().ok_or_else(|| DimError::Unbound {
                    symbol: self.symbols[*index].clone(),
                    expr: dim.to_string(),
                })?,
                Entry::FloorDiv(a, b) => at(a) / nonzero(b)?,
                Entry::CeilDiv(a, b) => at(a).div_ceil(nonzero(b)?),
                Entry::Min(a, b) => at(a).min(at(b)),
                Entry::Max(a, b) => at(a).max(at(b)),
                Entry::Sum(terms) => sum(terms, values)
                    .map_err(|value| DimError::OutOfRange { expr: dim.to_string(), value })?,
            };
            values.push(value);
        }
        Ok(())
    }
}

fn sum(terms: &[(i64, Vec<SizeId>)], values: &[usize]) -> Result<usize, i128> {
    let mut total = 0i128;
    for (coeff, factors) in terms {
        let product = factors
            .iter()
            .try_fold(i128::from(*coeff), |product, id| product.checked_mul(values[id.index()] as i128));
        total = product.and_then(|p| total.checked_add(p)).ok_or(i128::MAX)?;
    }
    usize::try_from(total).map_err(|_| total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_direct_evaluation() {
        let (rows, batch) = (Dim::symbol("rows"), Dim::symbol("batch"));
        let dims = [
            &rows * &Dim::Known(384),
            batch.clone() + 1,
            (rows.clone() + 63).ceil_div(64) * batch.clone(),
            rows.minimum(&batch).maximum(3usize),
            rows.floor_div(7usize) * rows.clone() - batch.clone(),
            Dim::Known(12),
        ];
        let mut table = SizeTable::new([Symbol::new("rows"), Symbol::new("batch")]);
        let ids: Vec<SizeId> = dims.iter().map(|d| table.intern(d).unwrap()).collect();
        let entries = table.len();
        assert_eq!(table.intern(&dims[2]).unwrap(), ids[2]);
        assert_eq!(table.len(), entries);
        let binding = crate::DimBinding::new().with("rows", 100).with("batch", 5);
        let mut values = Vec::new();
        table.eval(&[100, 5], &mut values).unwrap();
        for (dim, id) in dims.iter().zip(ids) {
            assert_eq!(values[id.index()], dim.eval(&binding).unwrap(), "{dim}");
        }
    }

    #[test]
    fn refuses_unknown_symbols_and_negative_sizes() {
        let mut table = SizeTable::new([Symbol::new("a")]);
        assert!(table.intern(&Dim::symbol("b")).is_err());
        table.intern(&(Dim::symbol("a") - 5)).unwrap();
        let mut values = Vec::new();
        assert!(table.eval(&[3], &mut values).is_err());
        table.eval(&[7], &mut values).unwrap();
    }
}
