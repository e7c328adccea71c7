//! A specialised template: capacities bound, every buffer at a known place.

use super::memory::{ArenaPlan, Lifetime, live_bytes_bound, plan_arena};
use super::places::{BufferId, BufferKind};
use super::template::{PlanError, Template};
use rlx_tensor::{DimBinding, DimError};
use std::ops::Range;
use std::sync::Arc;

/// A template under capacities: no symbols are left, but a run may use any extents up to the capacities.
#[derive(Debug, Clone)]
pub struct Lir {
    template: Arc<Template>,
    binding: DimBinding,
    capacities: Vec<usize>,
    arena: ArenaPlan,
    arena_buffers: Vec<BufferId>,
}

impl Template {
    /// Binds every symbol to its capacity and places every buffer. Unbound and unknown symbols are errors.
    pub fn specialize(self: &Arc<Self>, binding: &DimBinding) -> Result<Lir, PlanError> {
        let (capacities, arena_buffers) = self.capacities(binding)?;
        let lifetimes: Vec<Lifetime> = arena_buffers.iter().map(|b| self.lifetime(&capacities, *b)).collect();
        let arena = plan_arena(&lifetimes);
        let lir =
            Lir { template: Arc::clone(self), binding: binding.clone(), capacities, arena, arena_buffers };
        debug_assert_eq!(lir.verify(), Ok(()));
        Ok(lir)
    }

    /// Every size at capacity, and the buffers that stand in the arena. No sum of them overflows.
    fn capacities(&self, binding: &DimBinding) -> Result<(Vec<usize>, Vec<BufferId>), PlanError> {
        let symbols = self.symbol_values(binding)?;
        let mut capacities = Vec::with_capacity(self.sizes.len());
        self.sizes.eval(&symbols, &mut capacities)?;
        self.check_sizes(&capacities)?;
        let mut arena_buffers = Vec::new();
        let mut total = Some(0usize);
        for (index, buffer) in self.buffers.iter().enumerate() {
            let (id, bytes) = (BufferId::from_index(index), capacities[buffer.bytes.index()]);
            if isize::try_from(bytes).is_err() {
                return Err(PlanError::TooLarge { what: id.to_string() });
            }
            if matches!(buffer.kind, BufferKind::Arena) {
                total = total.and_then(|t| t.checked_add(bytes + 64));
                arena_buffers.push(id);
            }
        }
        match total {
            Some(_) => Ok((capacities, arena_buffers)),
            None => Err(PlanError::TooLarge { what: "the arena".to_owned() }),
        }
    }

    fn lifetime(&self, capacities: &[usize], id: BufferId) -> Lifetime {
        let buffer = &self.buffers[id.index()];
        Lifetime { bytes: capacities[buffer.bytes.index()], first: buffer.first, last: buffer.last }
    }

    /// Values of the template's symbols, in the table's order.
    pub(crate) fn symbol_values(&self, binding: &DimBinding) -> Result<Vec<usize>, PlanError> {
        let known = self.sizes.symbols();
        if let Some((symbol, _)) = binding.iter().find(|(s, _)| !known.contains(s)) {
            let reason = format!("the graph {:?} has no symbol {symbol}", self.name());
            return Err(DimError::Syntax { text: symbol.to_string(), reason }.into());
        }
        let value = |symbol| {
            binding.value(symbol).ok_or_else(|| DimError::Unbound {
                symbol: symbol.clone(),
                expr: format!("graph {}", self.name()),
            })
        };
        Ok(known.iter().map(value).collect::<Result<_, _>>()?)
    }

    /// Checks the equalities that inference left open.
    pub(crate) fn check_sizes(&self, values: &[usize]) -> Result<(), PlanError> {
        for check in &self.checks {
            let (left, right) = (values[check.left.index()], values[check.right.index()]);
            if left != right {
                return Err(PlanError::Unequal {
                    node: check.node.clone(),
                    left: self.sizes.dim(check.left).to_string(),
                    left_value: left,
                    right: self.sizes.dim(check.right).to_string(),
                    right_value: right,
                });
            }
        }
        Ok(())
    }
}

impl Lir {
    /// A plan whose arena was placed before: an offset for each arena buffer, in order. It is to be verified.
    pub(super) fn from_parts(
        template: Arc<Template>,
        binding: &DimBinding,
        offsets: Vec<usize>,
        arena_bytes: usize,
    ) -> Result<Lir, PlanError> {
        let (capacities, arena_buffers) = template.capacities(binding)?;
        let arena = ArenaPlan { offsets, bytes: arena_bytes };
        Ok(Lir { template, binding: binding.clone(), capacities, arena, arena_buffers })
    }

    /// The template.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// The capacities by symbol.
    pub fn binding(&self) -> &DimBinding {
        &self.binding
    }

    /// The value of every entry of the template's size table at capacity.
    pub fn capacities(&self) -> &[usize] {
        &self.capacities
    }

    /// Size of the arena in bytes.
    pub fn arena_bytes(&self) -> usize {
        self.arena.bytes
    }

    /// The most arena bytes that live at one step: no arena can be smaller.
    pub fn live_bytes_bound(&self) -> usize {
        let lifetimes = self.arena_buffers.iter().map(|&b| self.template.lifetime(&self.capacities, b));
        live_bytes_bound(&lifetimes.collect::<Vec<_>>())
    }

    /// Bytes of a buffer at capacity.
    pub fn buffer_bytes(&self, id: BufferId) -> usize {
        self.capacities[self.template.buffers[id.index()].bytes.index()]
    }

    /// Arena buffers with their byte ranges.
    pub fn placed(&self) -> impl Iterator<Item = (BufferId, Range<usize>)> + '_ {
        self.arena_buffers.iter().zip(&self.arena.offsets).map(|(&buffer, &offset)| {
            let bytes = self.buffer_bytes(buffer);
            (buffer, offset..offset + bytes)
        })
    }

    /// The arena offset of a buffer; `None` if someone else owns it.
    pub fn offset(&self, id: BufferId) -> Option<usize> {
        let at = self.arena_buffers.binary_search(&id).ok()?;
        Some(self.arena.offsets[at])
    }
}
