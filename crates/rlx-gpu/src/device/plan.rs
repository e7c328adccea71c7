//! A template's launches, and the calls of a run that they become: the same for every device.

use super::driver::Limits;
use super::layout::Layout;
use crate::ir::{Binding, Kernel, Placement};
use crate::lower::classes::Class;
use crate::lower::schedules::Choices;
use crate::lower::{Amount, Extents, Guard, Home, Launch, LowerCx, cache, resident};
use rlx::backend::BackendError;
use rlx::plan::{BufferId, Lir, Template};
use rlx_tensor::quant::Q8Head;
use rlx_tensor::{DType, Symbol};
use std::sync::Arc;

/// A template's launches.
pub(super) struct Plan {
    pub launches: Vec<Launch>,
    pub guards: Vec<Guard>,
    /// For each launch its kernel's position among the kernels.
    pub kernel_of: Vec<usize>,
    pub kernels: Vec<Arc<Kernel>>,
    pub dtypes: Vec<Option<DType>>,
    /// Buffers of states that stay on the device.
    pub resident: Arc<[bool]>,
    /// Of those, how heads of integers are made.
    pub caches: Vec<Option<Q8Head>>,
    /// Kernels that a schedule may be chosen for.
    pub classes: Vec<Class>,
    scratch: Vec<Amount>,
}

/// A launch of this run: which of the plan's, where its arguments begin, and its grid.
pub(super) struct Planned {
    pub launch: usize,
    pub arguments: usize,
    pub grid: [usize; 2],
}

/// The launches of a run with the table of their arguments.
pub(super) struct Schedule {
    pub planned: Vec<Planned>,
    pub arguments: Vec<u32>,
    pub pitch: usize,
}

/// As many programs as asked for, or somewhat more, in two axes.
fn grid(programs: usize, most: usize) -> [usize; 2] {
    let across = programs.min(most);
    [across, programs.div_ceil(across.max(1))]
}

impl Plan {
    /// The launches for a device whose bindings have at most so many words, with these schedules.
    pub fn of(template: &Template, binding_words: usize, choices: &Choices) -> Result<Self, BackendError> {
        let mut cx = LowerCx::new(template);
        cx.binding_words = binding_words;
        cx.choices = choices.clone();
        for (at, step) in template.steps().iter().enumerate() {
            cx.lower(at, step)?;
        }
        let kernels = cx.kernels();
        let position =
            |l: &Launch| kernels.iter().position(|k| Arc::ptr_eq(k, &l.kernel)).unwrap_or_default();
        let kernel_of = cx.launches.iter().map(position).collect();
        let dtypes = super::layout::buffer_dtypes(template)?;
        let resident = resident(template);
        let LowerCx { launches, guards, scratch, classes, .. } = cx;
        let caches = cache::caches(template);
        Ok(Plan { kernel_of, kernels, dtypes, resident, caches, classes, scratch, launches, guards })
    }

    /// Where a specialisation's buffers stand, in segments of at most so many words.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] names what a segment does not hold.
    pub fn layout(&self, lir: &Lir, most: usize) -> Result<Layout, BackendError> {
        let run = Extents { sizes: lir.capacities(), symbol: &|_| None };
        let scratch = self.scratch.iter().filter_map(|amount| amount.eval(&run)).max();
        Layout::new(lir, &self.dtypes, &self.resident, self.guards.len(), scratch.unwrap_or(0), most)
    }

    /// Bytes by which states are larger on the device than on the host.
    pub fn widening(&self, lir: &Lir) -> usize {
        let ids = lir.template().buffer_ids().map(|(id, _)| id).zip(&self.dtypes);
        let wider = ids.filter(|(id, _)| self.resident[id.index()]).map(|(id, dtype)| {
            let bytes = lir.buffer_bytes(id);
            let words = match self.caches[id.index()] {
                Some(head) => bytes / head.bytes() * head.positions * cache::head_words(head.dim),
                None => bytes / dtype.and_then(DType::element_bytes).unwrap_or(4),
            };
            (words * 4).saturating_sub(bytes)
        });
        wider.sum()
    }

    /// Words from one launch's arguments to the next.
    pub fn pitch(&self, limits: Limits) -> usize {
        let most = self.kernels.iter().map(|kernel| kernel.args.len()).max().unwrap_or(0).max(1);
        most.next_multiple_of(limits.argument_words.max(1))
    }

    /// Every launch that has programs in this run, its views checked against the buffers they reach into.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] names the step and the kernel.
    pub fn schedule(
        &self,
        template: &Template,
        layout: &Layout,
        limits: Limits,
        sizes: &[usize],
        symbols: &[usize],
        state_words: &dyn Fn(BufferId) -> usize,
    ) -> Result<Schedule, BackendError> {
        let symbol = |s: &Symbol| template.sizes().symbol_index(s).map(|i| symbols[i]);
        let run = Extents { sizes, symbol: &symbol };
        let pitch = self.pitch(limits);
        let mut schedule = Schedule { planned: Vec::new(), arguments: Vec::new(), pitch };
        for (at, launch) in self.launches.iter().enumerate() {
            let step = &template.steps()[launch.step];
            let refuse = |reason: &str| BackendError::Unsupported {
                op: step.op.def().name().to_owned(),
                location: step.location.clone(),
                reason: format!("{}: {reason}", launch.kernel.name),
            };
            let too_large = || refuse("a size exceeds what a device's integers hold");
            let programs = launch.programs.eval(&run).ok_or_else(too_large)?;
            if programs == 0 {
                continue;
            }
            let arguments = arguments(launch, layout, &run).ok_or_else(too_large)?;
            for (view, source) in launch.kernel.views.iter().zip(&launch.views) {
                let end = match (view.binding, &source.home) {
                    (_, Home::Scratch) => layout.scratch_end(),
                    (_, Home::Stack(_)) => source.band.map_or(0, |band| band.words),
                    (Binding::Arena, Home::Buffer(buffer)) => layout.end(*buffer),
                    (Binding::Weight(_), Home::Buffer(buffer)) => {
                        source.band.map_or_else(|| layout.elements(*buffer), |band| band.words)
                    }
                    (Binding::State(_), Home::Buffer(buffer)) => state_words(*buffer),
                };
                if launch.kernel.reach(view, &arguments) > end as u64 {
                    return Err(refuse("a view reaches beyond its buffer"));
                }
            }
            let first = schedule.arguments.len();
            schedule.arguments.extend(arguments.iter().map(|&value| value as u32));
            schedule.arguments.resize(first + pitch, 0);
            let grid = grid(programs, limits.grid);
            schedule.planned.push(Planned { launch: at, arguments: first, grid });
        }
        Ok(schedule)
    }
}

/// A launch's arguments in a run; `None` for a value beyond 31 bits.
fn arguments(launch: &Launch, layout: &Layout, run: &Extents<'_>) -> Option<Vec<i32>> {
    let sizes: Option<Vec<usize>> = launch.sizes.iter().map(|a| a.eval(run)).collect();
    let mut places = Vec::with_capacity(launch.views.len());
    for source in &launch.views {
        let own = match source.home {
            Home::Scratch => layout.scratch.at,
            Home::Stack(_) => 0,
            Home::Buffer(buffer) => layout.offset(buffer),
        };
        let base = source.base.eval(run)?.checked_add(own)?;
        let strides: Option<Vec<usize>> = source.strides.iter().map(|s| s.eval(run)).collect();
        places.push(Placement { base, strides: strides? });
    }
    launch.kernel.arguments(&sizes?, &places)
}

#[cfg(test)]
mod tests {
    use super::grid;

    #[test]
    fn a_grid_has_at_least_the_programs_asked_for_and_is_no_wider_than_allowed() {
        for (programs, most) in [(1, 8), (8, 8), (9, 8), (100, 8), (65_536, 32_768)] {
            let [x, y] = grid(programs, most);
            assert!(x <= most && x * y >= programs && x * (y - 1) < programs, "{programs} {most}");
        }
    }
}
