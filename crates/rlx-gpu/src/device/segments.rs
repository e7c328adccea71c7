//! Launches over an arena of several segments: what stands beyond the first is bound behind the states, and is to a kernel a state more.

use super::layout::Layout;
use super::{Loaded, OpenDevice};
use crate::device::driver::Driver;
use crate::ir::{Binding, Kernel};
use crate::lower::{Home, Launch, MAX_BOUND};
use rlx::backend::BackendError;
use rlx::plan::Template;
use std::sync::Arc;

/// How the launches of a context reach the arena.
pub(super) struct Reach<D: Driver> {
    /// For each launch its kernel, and the segments that it binds behind its states.
    launches: Vec<(Arc<D::Kernel>, Vec<usize>)>,
}

/// The kernel with views of other segments than the first as states, and those segments; `None` for views of the first alone.
fn rebound(launch: &Launch, layout: &Layout) -> Option<(Kernel, Vec<usize>)> {
    let mut kernel = Kernel::clone(&launch.kernel);
    let mut further: Vec<usize> = Vec::new();
    for (view, source) in kernel.views.iter_mut().zip(&launch.views) {
        let spot = match &source.home {
            Home::Scratch => Some(layout.scratch),
            Home::Buffer(id) => layout.placed(*id),
            Home::Stack(_) => None,
        };
        let Some(segment) = spot.map(|spot| spot.segment).filter(|&s| s > 0) else { continue };
        if view.binding != Binding::Arena {
            continue;
        }
        let at = further.iter().position(|&known| known == segment).unwrap_or_else(|| {
            further.push(segment);
            further.len() - 1
        });
        view.binding = Binding::State((launch.states.len() + at) as u32);
    }
    (!further.is_empty()).then_some((kernel, further))
}

impl<D: Driver> Reach<D> {
    /// Kernels of a context whose arena is laid out so.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for a launch that binds too much; as the device says.
    pub fn new(loaded: &Loaded<D>, layout: &Layout) -> Result<Self, BackendError> {
        let (plan, template) = (&loaded.plan, &loaded.template);
        let own = plan.kernel_of.iter().map(|&kernel| (Arc::clone(&loaded.kernels[kernel]), Vec::new()));
        let mut reach = Reach { launches: own.collect() };
        if layout.segments.len() == 1 {
            return Ok(reach);
        }
        let (mut others, mut kernels) = (Vec::new(), Vec::<Arc<Kernel>>::new());
        for (at, launch) in plan.launches.iter().enumerate() {
            if let Some((kernel, further)) = rebound(launch, layout) {
                within_bindings(template, launch, further.len(), &loaded.device)?;
                let known = kernels.iter().position(|other| **other == kernel).unwrap_or_else(|| {
                    kernels.push(Arc::new(kernel));
                    kernels.len() - 1
                });
                others.push((at, known, further));
            }
        }
        let compiled = loaded.device.compile(&kernels)?;
        for (at, kernel, further) in others {
            reach.launches[at] = (Arc::clone(&compiled[kernel]), further);
        }
        Ok(reach)
    }

    pub fn kernel(&self, launch: usize) -> &D::Kernel {
        &self.launches[launch].0
    }

    pub fn further(&self, launch: usize) -> &[usize] {
        &self.launches[launch].1
    }
}

fn within_bindings<D: Driver>(
    template: &Template,
    launch: &Launch,
    further: usize,
    device: &OpenDevice<D>,
) -> Result<(), BackendError> {
    let bound = launch.weights.len() + launch.states.len() + further;
    if bound <= MAX_BOUND {
        return Ok(());
    }
    let step = &template.steps()[launch.step];
    let limit = device.driver.limits().binding_words.saturating_mul(4);
    Err(BackendError::Unsupported {
        op: step.op.def().name().to_owned(),
        location: step.location.clone(),
        reason: format!(
            "its operands stand in so many bindings of {limit} bytes that its kernel would bind {bound} beside the arena, of at most {MAX_BOUND}; \
             fewer rows or a shorter context need fewer"
        ),
    })
}
