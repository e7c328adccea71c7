//! Prints how long graphs of 10,000 nodes take to plan: a chain, and a chain with a branch at every fourth node.
use rlx::plan::{PlanTarget, Template};
use rlx_graph::ops::binary::{Binary, BinaryOp};
use rlx_graph::ops::softmax::Softmax;
use rlx_graph::{Graph, Op};
use rlx_tensor::{DType, DimBinding, Shape};
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Plain;

impl PlanTarget for Plain {
    fn accepts_strided(&self, _op: &Op, _operand: usize) -> bool {
        true
    }

    fn accepts_in_place(&self, _op: &Op, _operand: Option<usize>, _result: &Shape) -> bool {
        false
    }
}

fn graph(nodes: usize, branches: bool) -> Result<Graph, rlx_graph::GraphError> {
    let mut graph = Graph::new("large");
    let mut value = graph.input("x", Shape::new(&["rows", "width"], DType::F32))?;
    let mut kept = value;
    for at in 0..nodes {
        let next = match branches && at % 4 == 3 {
            true => graph.add_one(Binary { kind: BinaryOp::Add }, &[value, kept])?,
            false => graph.add_one(Softmax { axis: 1 }, &[value])?,
        };
        if at % 4 == 1 {
            kept = next;
        }
        value = next;
    }
    graph.set_outputs(&[("y", value)])?;
    Ok(graph)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for (name, branches) in [("chain", false), ("branches", true)] {
        let graph = graph(10_000, branches)?;
        let binding = DimBinding::new().with("rows", 512).with("width", 384);
        let (mut build, mut place): (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
        let mut plan = None;
        for _ in 0..9 {
            let started = Instant::now();
            let template = Arc::new(Template::build(&graph, &Plain)?);
            build.push(started.elapsed());
            let started = Instant::now();
            plan = Some(template.specialize(&binding)?);
            place.push(started.elapsed());
        }
        build.sort_unstable();
        place.sort_unstable();
        if let Some(lir) = plan {
            lir.verify()?;
            let (arena, bound) = (lir.arena_bytes(), lir.live_bytes_bound());
            println!(
                "{name}: template {:?}, specialise {:?} (medians of 9); arena {arena}, live bytes {bound}",
                build[4], place[4]
            );
        }
    }
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn std::error::Error>> {
    main()
}
