//! A small graph whose results a device is held to before it is trusted with more of its kind.

use super::DeviceTarget;
use super::driver::{Batch, Call, Driver, Read, Write, refused};
use super::plan::Plan;
use crate::lower::Home;
use crate::lower::schedules::Choices;
use rlx::backend::BackendError;
use rlx::plan::{BufferKind, InterfaceEntry, Template};
use rlx_graph::Graph;
use rlx_tensor::DimBinding;
use std::sync::Arc;

/// A graph of rows, one result and weights of these words.
pub(super) struct Trial {
    what: &'static str,
    template: Arc<Template>,
    weights: Vec<Vec<u32>>,
}

/// Numbers between -1 and 1 of several magnitudes.
pub(super) fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let number = |i: usize| {
        let bits = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(2_246_822_519);
        let unit = (bits >> 8) as f32 / (1 << 23) as f32 - 1.0;
        unit / (1 << (bits & 7)) as f32
    };
    (0..count).map(number).collect()
}

impl Trial {
    pub fn new(what: &'static str, text: &str, weights: Vec<Vec<u32>>) -> Result<Self, BackendError> {
        let wrong = |e: &dyn std::fmt::Display| refused("the self-test", what, e);
        let graph: Graph = text.parse().map_err(|e| wrong(&e))?;
        let template = Template::build(&graph, &DeviceTarget).map_err(|e| wrong(&e))?;
        Ok(Trial { what, template: Arc::new(template), weights })
    }

    pub fn name(&self) -> &str {
        self.template.name()
    }

    /// So many words of the results, of so many rows and these inputs.
    pub fn run<D: Driver>(
        &self,
        driver: &D,
        choices: &Choices,
        rows: usize,
        inputs: &[&[f32]],
        count: usize,
    ) -> Result<Vec<f32>, BackendError> {
        let (template, limits) = (&self.template, driver.limits());
        // Every device binds operands of this size whole.
        let plan = Plan::of(template, usize::MAX, choices)?;
        let binding = DimBinding::new().with("rows", rows);
        let lir = template.specialize(&binding).map_err(|e| refused(&driver.name(), self.what, e))?;
        let layout = plan.layout(&lir, usize::MAX)?;
        let schedule = plan.schedule(template, &layout, limits, lir.capacities(), &[rows], &|_| 0)?;
        let what = template.name();
        let arena = driver.allocate(what, layout.words())?;
        let arguments = driver.allocate(what, schedule.arguments.len())?;
        let upload = |words: &Vec<u32>| {
            let weight = driver.allocate(what, words.len())?;
            driver.upload(what, &weight, 0, words)?;
            Ok(weight)
        };
        let weights: Vec<D::Buffer> = self.weights.iter().map(upload).collect::<Result<_, BackendError>>()?;
        let weight_of = |home: &Home| match home {
            Home::Buffer(id) => match template.buffers()[id.index()].kind {
                BufferKind::Param(at) => weights.get(at),
                _ => None,
            },
            _ => None,
        };
        let place = |entry: &InterfaceEntry| layout.offset(entry.place.buffer);
        let launch = |of: usize| &plan.launches[of];
        let kernels = schedule.planned.iter().map(|of| driver.compile(&launch(of.launch).kernel));
        let kernels: Vec<D::Kernel> = kernels.collect::<Result<_, _>>()?;
        let calls = schedule.planned.iter().zip(&kernels).map(|(planned, kernel)| Call {
            kernel,
            arguments: planned.arguments,
            bound: launch(planned.launch).weights.iter().filter_map(|bound| weight_of(&bound.home)).collect(),
            grid: planned.grid,
        });
        let given = template.inputs().iter().zip(inputs);
        let given = given.map(|(entry, values)| Write {
            to: &arena,
            at: place(entry),
            words: values.iter().map(|x| x.to_bits()).collect(),
        });
        let table = Write { to: &arguments, at: 0, words: schedule.arguments.clone() };
        let batch = Batch {
            graph: what,
            arena: &arena,
            further: &[],
            arguments: &arguments,
            table: &schedule.arguments,
            pitch: schedule.pitch,
            writes: std::iter::once(table).chain(given).collect(),
            calls: calls.collect(),
            reads: vec![Read { from: &arena, at: place(&template.outputs()[0]), count }],
        };
        let mut work = driver.work()?;
        let pending = driver.submit(&mut work, &batch)?;
        let words = driver.read(&mut work, pending)?;
        Ok(words.into_iter().map(f32::from_bits).collect())
    }
}
