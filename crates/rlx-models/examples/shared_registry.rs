//! Two models on one registry: each weight is in memory once, and so is its packed copy. The embedding of the second is tied to that of
//! the first.
//!
//! ```text
//! cargo run --release -p rlx-models --example shared_registry
//! ```

use rlx::weights::{WeightKind, WeightRegistry};
use rlx::{CompileOptions, Session, TensorArg};
use rlx_graph::Graph;
use rlx_graph::ops::embedding::Embedding;
use rlx_graph::ops::linear::Linear;
use rlx_tensor::{DType, Dim, Shape};
use std::error::Error;
use std::sync::Arc;

const VOCAB: usize = 1000;
const WIDTH: usize = 64;

/// Token ids to logits: rows of a table, times a head.
fn model(name: &str, table: &str, head: &str) -> Result<Graph, Box<dyn Error>> {
    let mut graph = Graph::new(name);
    let ids = graph.input("ids", Shape::from_dims(vec![Dim::symbol("rows")], DType::I32))?;
    let weight = Shape::new(&[VOCAB, WIDTH], DType::F32);
    let table = graph.param(table, weight.clone())?;
    let head = match graph.by_name(head) {
        Some(tied) => tied,
        None => graph.param(head, weight)?,
    };
    let rows = graph.add_one(Embedding {}, &[ids, table])?;
    let logits = graph.add_one(Linear::plain(), &[rows, head])?;
    graph.set_outputs(&[("logits", logits)])?;
    Ok(graph)
}

fn main() -> Result<(), Box<dyn Error>> {
    let registry = Arc::new(WeightRegistry::new());
    let values: Vec<f32> = (0..VOCAB * WIDTH).map(|i| ((i * 7919) % 1013) as f32 / 506.5 - 1.0).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = Shape::new(&[VOCAB, WIDTH], DType::F32);
    let table = registry.register("table", shape.clone(), bytes, WeightKind::Base)?;
    registry.register("second.table", shape, Vec::<u8>::new(), WeightKind::TiedAlias { target: table })?;

    let session = Session::new(rlx::devices::Device::Cpu)?.with_weights(Arc::clone(&registry));
    let options = CompileOptions { weights_required: true, ..CompileOptions::default() };
    let first = session.compile_with(&model("first", "table", "table")?, &options)?;
    let second = session.compile_with(&model("second", "second.table", "second.table")?, &options)?;

    let ids = [3i32, 141, 59];
    let run = |compiled: &rlx::CompiledGraph| compiled.run(&[("ids", TensorArg::from(&ids[..]))]);
    let (a, b) = (run(&first)?, run(&second)?);
    assert_eq!(a[0].1.bytes(), b[0].1.bytes());
    println!("{} names, {} bytes of weights", registry.len(), registry.total_bytes());
    println!("{} bytes of packed copies", registry.packed_bytes());
    assert_eq!(registry.total_bytes(), (VOCAB * WIDTH * 4) as u64);
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    main()
}
