//! The template: everything about a compiled graph that does not depend on sizes.

use super::lifetimes::Placer;
use super::places::{Buffer, BufferId, BufferKind, Place};
use rlx_graph::{Graph, GraphError, NodeId, Op, ValueId};
use rlx_tensor::{Dim, DimError, Shape, SizeId, SizeTable};

/// What a planner must know of the device that will run the steps.
pub trait PlanTarget {
    /// Whether the op's kernel takes this operand with rows that are not adjacent.
    fn accepts_strided(&self, op: &Op, operand: usize) -> bool;

    /// Whether the op's kernel writes its first result with rows that are not adjacent.
    fn writes_strided(&self, op: &Op) -> bool {
        let _ = op;
        false
    }

    /// Whether the op's kernel may write its first result, of this shape, over this operand (`None`: not an operand).
    fn accepts_in_place(&self, op: &Op, operand: Option<usize>, result: &Shape) -> bool;
}

/// Why a graph cannot be planned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A size cannot be expressed or evaluated.
    #[error(transparent)]
    Dim(#[from] DimError),
    /// The graph is malformed.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A node uses a value before any node makes it.
    #[error("value {value} is used before it is made")]
    Unplaced {
        /// The value.
        value: ValueId,
    },
    /// A size that two operands must share differs under this binding.
    #[error("{node}: {left} is {left_value} but {right} is {right_value}")]
    Unequal {
        /// The node that relies on it.
        node: String,
        /// One size.
        left: String,
        /// Its value.
        left_value: usize,
        /// The other.
        right: String,
        /// Its value.
        right_value: usize,
    },
    /// A size exceeds what memory can address.
    #[error("{what} takes more bytes than can be addressed under this binding")]
    TooLarge {
        /// What is too large.
        what: String,
    },
}

/// One kernel call to be: an op with places.
#[derive(Debug, Clone)]
pub struct StepSpec {
    /// The op.
    pub op: Op,
    /// Operands.
    pub inputs: Vec<Place>,
    /// Results.
    pub outputs: Vec<Place>,
    /// Where the graph's author wrote the node.
    pub location: String,
}

/// An input, param, state or output.
#[derive(Debug, Clone)]
pub struct InterfaceEntry {
    /// Its name.
    pub name: String,
    /// Dims and dtype, symbolic.
    pub shape: Shape,
    /// Its place.
    pub place: Place,
}

/// Two sizes that must be equal whenever the template runs.
#[derive(Debug, Clone)]
pub(crate) struct SizeCheck {
    pub left: SizeId,
    pub right: SizeId,
    pub node: String,
}

/// Order, lifetimes, places and size expressions of a compiled graph.
#[derive(Debug, Clone)]
pub struct Template {
    name: String,
    pub(crate) sizes: SizeTable,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) steps: Vec<StepSpec>,
    pub(crate) inputs: Vec<InterfaceEntry>,
    pub(crate) params: Vec<InterfaceEntry>,
    pub(crate) states: Vec<InterfaceEntry>,
    pub(crate) outputs: Vec<InterfaceEntry>,
    pub(crate) checks: Vec<SizeCheck>,
}

impl Template {
    /// Plans a graph whose ops the target runs.
    pub fn build(graph: &Graph, target: &dyn PlanTarget) -> Result<Template, PlanError> {
        let mut sizes = SizeTable::new(graph.symbols());
        let mut placer = Placer::new(graph, target, &mut sizes);
        placer.place_sources()?;
        let mut steps = Vec::new();
        let mut step_of_node = vec![0; graph.nodes().len()];
        for (id, _) in graph.nodes() {
            step_of_node[id.index()] = steps.len();
            if !placer.place_view(id)? && !placer.place_join(id)? {
                placer.place_results(id, steps.len())?;
                steps.push(step(graph, &placer, id)?);
            }
        }
        let outputs = place_outputs(graph, &mut placer, &mut steps)?;
        close_lifetimes(&mut placer, &step_of_node, steps.len());
        let entries = |values: Vec<ValueId>| -> Result<Vec<InterfaceEntry>, PlanError> {
            values.into_iter().map(|id| entry(graph, &placer, id)).collect()
        };
        let inputs = entries(graph.inputs().map(|(id, _)| id).collect())?;
        let params = entries(graph.params().map(|(id, _)| id).collect())?;
        let states = entries(graph.states().map(|(id, _)| id).collect())?;
        let buffers = std::mem::take(&mut placer.buffers);
        let mut checks = Vec::with_capacity(graph.checks().len());
        for check in graph.checks() {
            let node = graph.node(check.node);
            let node = format!("{} at {}", node.op.def().name(), node.location);
            let (left, right) = (sizes.intern(&check.left)?, sizes.intern(&check.right)?);
            checks.push(SizeCheck { left, right, node });
        }
        let name = graph.name().to_owned();
        Ok(Template { name, sizes, buffers, steps, inputs, params, states, outputs, checks })
    }

    /// A template from its parts; `interface` holds inputs, params, states and outputs.
    pub(super) fn from_parts(
        name: String,
        sizes: SizeTable,
        buffers: Vec<Buffer>,
        steps: Vec<StepSpec>,
        interface: [Vec<InterfaceEntry>; 4],
        checks: Vec<SizeCheck>,
    ) -> Template {
        let [inputs, params, states, outputs] = interface;
        Template { name, sizes, buffers, steps, inputs, params, states, outputs, checks }
    }

    /// Pairs of sizes that must be equal in every run, with the node that relies on it.
    pub fn checks(&self) -> impl ExactSizeIterator<Item = (&Dim, &Dim, &str)> {
        self.checks.iter().map(|c| (self.sizes.dim(c.left), self.sizes.dim(c.right), c.node.as_str()))
    }

    /// Dims and dtype of a place, as expressions.
    pub fn shape(&self, place: &Place) -> Shape {
        Shape::from_dims(place.dims.iter().map(|&d| self.sizes.dim(d).clone()).collect(), place.dtype)
    }

    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Every size expression.
    pub fn sizes(&self) -> &SizeTable {
        &self.sizes
    }

    /// Every buffer with its id, in order.
    pub fn buffer_ids(&self) -> impl ExactSizeIterator<Item = (BufferId, &Buffer)> {
        self.buffers.iter().enumerate().map(|(index, buffer)| (BufferId::from_index(index), buffer))
    }

    /// Buffers; a buffer's position is its region number.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// Steps in order.
    pub fn steps(&self) -> &[StepSpec] {
        &self.steps
    }

    /// Inputs in declaration order.
    pub fn inputs(&self) -> &[InterfaceEntry] {
        &self.inputs
    }

    /// Params in declaration order.
    pub fn params(&self) -> &[InterfaceEntry] {
        &self.params
    }

    /// States in declaration order.
    pub fn states(&self) -> &[InterfaceEntry] {
        &self.states
    }

    /// Outputs in order.
    pub fn outputs(&self) -> &[InterfaceEntry] {
        &self.outputs
    }

    /// Positions of the states that some op overwrites, rather than appends to.
    pub fn overwritten_states(&self) -> impl Iterator<Item = usize> + '_ {
        let overwrites = |buffer: BufferId| {
            self.steps.iter().any(|step| {
                let props = step.op.def().props();
                !props.appends && props.writes.iter().any(|&operand| step.inputs[operand].buffer == buffer)
            })
        };
        let states = self.states.iter().enumerate();
        states.filter(move |(_, entry)| overwrites(entry.place.buffer)).map(|(at, _)| at)
    }
}

fn entry(graph: &Graph, placer: &Placer<'_>, id: ValueId) -> Result<InterfaceEntry, PlanError> {
    let value = graph.value(id);
    let name = value.name.clone().unwrap_or_else(|| id.to_string());
    Ok(InterfaceEntry { name, shape: value.shape.clone(), place: placer.place(id)?.clone() })
}

fn step(graph: &Graph, placer: &Placer<'_>, id: NodeId) -> Result<StepSpec, PlanError> {
    let node = graph.node(id);
    let places = |values: &[ValueId]| -> Result<Vec<Place>, PlanError> {
        values.iter().map(|&v| placer.place(v).cloned()).collect()
    };
    Ok(StepSpec {
        op: node.op.clone(),
        inputs: places(&node.inputs)?,
        outputs: places(&node.outputs)?,
        location: node.location.to_string(),
    })
}

/// Each output needs a buffer of the caller's: the one its step writes, or a copy where the value is something else as well.
fn place_outputs(
    graph: &Graph,
    placer: &mut Placer<'_>,
    steps: &mut Vec<StepSpec>,
) -> Result<Vec<InterfaceEntry>, PlanError> {
    let mut outputs = Vec::with_capacity(graph.outputs().len());
    for (position, (name, value)) in graph.outputs().iter().enumerate() {
        let from = placer.place(*value)?.clone();
        let shape = graph.shape(*value).clone();
        let kind = &placer.buffers[from.buffer.index()].kind;
        let place = if matches!(kind, BufferKind::Output(p) if *p == position) {
            from
        } else {
            let copy = rlx_graph::ops::reshape::Reshape { dims: shape.dims().to_vec() };
            let bytes = placer.sizes.intern(&rlx_graph::op::shape_bytes(&shape))?;
            let buffer = BufferId::from_index(placer.buffers.len());
            let (at, kind) = (steps.len(), BufferKind::Output(position));
            placer.buffers.push(Buffer { kind, bytes, first: at, last: at });
            placer.buffer_last.push(usize::MAX);
            let to = Place { buffer, offset: 0, stride: None, ..from.clone() };
            let location = format!("output {name}");
            steps.push(StepSpec { op: copy.into(), inputs: vec![from], outputs: vec![to.clone()], location });
            to
        };
        outputs.push(InterfaceEntry { name: name.clone(), shape, place });
    }
    Ok(outputs)
}

/// Turns each buffer's last using node into its last using step; a view behind the last step uses nothing after it.
fn close_lifetimes(placer: &mut Placer<'_>, step_of_node: &[usize], steps: usize) {
    for (buffer, &last) in placer.buffers.iter_mut().zip(&placer.buffer_last) {
        let last = step_of_node.get(last).copied().unwrap_or(steps.saturating_sub(1));
        buffer.last = last.min(steps.saturating_sub(1)).max(buffer.first);
    }
}
