//! Graphs within graphs: conditions, loops, scans, maps over sequences.

use super::Row;
use crate::error::{Refusal, invalid};
use crate::lower::Host;
use crate::model::axis_of;
use crate::program::Program;
use crate::value::{Value, truth_tensor};
use rlx_tensor::Tensor;

/// Values that a loop may gather.
const GATHERED_BYTES: usize = 1 << 32;

/// The rows of this family.
pub const ROWS: &[Row] = &[
    Row::host("If", condition),
    Row::host("Loop", repeat),
    Row::host("Scan", scan),
    Row::host("SequenceMap", sequence_map),
];

/// Runs a graph of the node on operands; what it takes from around stands in the node's order of graphs.
pub fn run_graph(h: &Host<'_>, name: &str, inputs: Vec<Option<Value>>) -> Result<Vec<Value>, Refusal> {
    let program = h.node.graph(name)?;
    run_program(h, name, program, inputs)
}

fn run_program(
    h: &Host<'_>,
    name: &str,
    program: &Program,
    inputs: Vec<Option<Value>>,
) -> Result<Vec<Value>, Refusal> {
    let mut start = 0;
    for (other, attr) in &h.node.attrs {
        if other == name {
            break;
        }
        if let crate::model::Attr::Graph(graph) = attr {
            start += graph.captures().len();
        }
    }
    let captured = h.captured.get(start..start + program.captures().len());
    let Some(captured) = captured else { return invalid("values from around the graph are missing") };
    Ok(program.run(h.runtime, &inputs, captured)?)
}

fn condition(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let branch = if h.value(0)?.truth()? { "then_branch" } else { "else_branch" };
    run_graph(h, branch, Vec::new())
}

fn repeat(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let trips = match h.optional(0) {
        Some(trips) => trips.int()?,
        None => i64::MAX,
    };
    let mut going = match h.optional(1) {
        Some(first) => first.truth()?,
        None => true,
    };
    let body = h.node.graph("body")?;
    let mut carried: Vec<Value> = h.inputs.iter().skip(2).flatten().cloned().collect();
    let count = carried.len();
    let Some(scans) = body.outputs().len().checked_sub(1 + count) else {
        return invalid("the body gives fewer values than it is given");
    };
    let mut gathered: Vec<Vec<Value>> = vec![Vec::new(); scans];
    let (mut trip, mut bytes) = (0i64, 0usize);
    while going && trip < trips {
        let mut inputs = vec![Some(Tensor::scalar(trip).into()), Some(truth_tensor(true)?)];
        inputs.extend(carried.iter().cloned().map(Some));
        let mut results = run_program(h, "body", body, inputs)?.into_iter();
        going = match results.next() {
            Some(going) => going.truth()?,
            None => return invalid("the body gives no condition"),
        };
        carried = results.by_ref().take(count).collect();
        for (all, value) in gathered.iter_mut().zip(results) {
            bytes += value.bytes();
            all.push(value);
        }
        if bytes > GATHERED_BYTES {
            return invalid(format!("the loop gathered more than {GATHERED_BYTES} bytes"));
        }
        trip += 1;
    }
    for all in gathered {
        carried.push(stack(all, 0)?);
    }
    Ok(carried)
}

/// Values of one shape side by side along a new axis.
pub fn stack(items: Vec<Value>, axis: usize) -> Result<Value, Refusal> {
    let Some(first) = items.first() else {
        return Ok(Tensor::zeros(&[0], rlx_tensor::DType::F32)?.into());
    };
    let first = first.tensor()?.clone();
    let dims = first.dims().to_vec();
    let element = first.dtype().element_bytes().unwrap_or(1);
    let outer: usize = dims[..axis.min(dims.len())].iter().product();
    let run = first.bytes().len() / outer.max(1);
    let mut bytes = Vec::with_capacity(first.bytes().len() * items.len());
    for row in 0..outer {
        for item in &items {
            let tensor = item.tensor()?;
            if tensor.dims() != dims || tensor.dtype() != first.dtype() {
                return invalid("the values of a scan differ in shape");
            }
            bytes.extend_from_slice(&tensor.bytes()[row * run..(row + 1) * run]);
        }
    }
    debug_assert!(run.is_multiple_of(element));
    let mut result = dims;
    result.insert(axis, items.len());
    Ok(Tensor::from_bytes(&result, first.dtype(), &bytes)?.into())
}

/// Element `at` of an axis, which goes.
fn element_at(tensor: &Tensor, axis: usize, at: usize) -> Result<Tensor, Refusal> {
    let dims = tensor.dims();
    let outer: usize = dims[..axis].iter().product();
    let run = tensor.bytes().len() / (outer * dims[axis]).max(1);
    let mut bytes = Vec::with_capacity(outer * run);
    for row in 0..outer {
        bytes.extend_from_slice(&tensor.bytes()[(row * dims[axis] + at) * run..][..run]);
    }
    let mut result = dims.to_vec();
    result.remove(axis);
    Ok(Tensor::from_bytes(&result, tensor.dtype(), &bytes)?)
}

fn axis_list(h: &Host<'_>, name: &str, count: usize) -> Result<Vec<i64>, Refusal> {
    let given = h.node.ints_opt(name)?.unwrap_or_else(|| vec![0; count]);
    if given.len() == count { Ok(given) } else { invalid(format!("{name} must have {count} entries")) }
}

fn scan(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let body = h.node.graph("body")?;
    let scanned = usize::try_from(h.node.int("num_scan_inputs", 0)?).unwrap_or(0);
    if h.node.opset < 9 {
        return batched_scan(h, body, scanned);
    }
    scan_once(h, body, scanned, &h.inputs)
}

fn scan_once(
    h: &Host<'_>,
    body: &Program,
    scanned: usize,
    inputs: &[Option<Value>],
) -> Result<Vec<Value>, Refusal> {
    let all: Vec<Value> = inputs.iter().flatten().cloned().collect();
    let Some(states) = all.len().checked_sub(scanned) else { return invalid("there are too few operands") };
    let outputs = body.outputs().len().saturating_sub(states);
    let (in_axes, in_ways) =
        (axis_list(h, "scan_input_axes", scanned)?, axis_list(h, "scan_input_directions", scanned)?);
    let (out_axes, out_ways) =
        (axis_list(h, "scan_output_axes", outputs)?, axis_list(h, "scan_output_directions", outputs)?);
    let mut sequences = Vec::new();
    for (value, axis) in all[states..].iter().zip(&in_axes) {
        let tensor = value.tensor()?;
        sequences.push((tensor, axis_of(*axis, tensor.dims().len())?));
    }
    let Some(steps) = sequences.first().map(|(t, axis)| t.dims()[*axis]) else {
        return invalid("nothing is scanned");
    };
    if sequences.iter().any(|(t, axis)| t.dims()[*axis] != steps) {
        return invalid("the scanned values differ in length");
    }
    let mut carried: Vec<Value> = all[..states].to_vec();
    let mut gathered: Vec<Vec<Value>> = vec![Vec::new(); outputs];
    for step in 0..steps {
        let mut operands: Vec<Option<Value>> = carried.iter().cloned().map(Some).collect();
        for ((tensor, axis), way) in sequences.iter().zip(&in_ways) {
            let at = if *way == 1 { steps - 1 - step } else { step };
            operands.push(Some(element_at(tensor, *axis, at)?.into()));
        }
        let mut results = run_program(h, "body", body, operands)?.into_iter();
        carried = results.by_ref().take(states).collect();
        gathered.iter_mut().zip(results).for_each(|(all, value)| all.push(value));
    }
    for ((mut all, axis), way) in gathered.into_iter().zip(out_axes).zip(out_ways) {
        if way == 1 {
            all.reverse();
        }
        let rank = all.first().and_then(Value::dims).map_or(1, |d| d.len() + 1);
        carried.push(stack(all, axis_of(axis, rank)?)?);
    }
    Ok(carried)
}

/// Version 8: the first operand is the sequences' lengths, and every other one has a batch axis in front.
fn batched_scan(h: &Host<'_>, body: &Program, scanned: usize) -> Result<Vec<Value>, Refusal> {
    let rest: Vec<Value> = h.inputs.iter().skip(1).flatten().cloned().collect();
    let batch = rest.first().and_then(Value::dims).and_then(|d| d.first().copied()).unwrap_or(0);
    let mut rows: Vec<Vec<Value>> = Vec::new();
    for b in 0..batch {
        let own = rest.iter().map(|v| Ok(Some(element_at(v.tensor()?, 0, b)?.into())));
        let own = own.collect::<Result<Vec<_>, Refusal>>()?;
        rows.push(scan_once(h, body, scanned, &own)?);
    }
    let count = rows.first().map_or(0, Vec::len);
    (0..count).map(|i| stack(rows.iter().map(|row| row[i].clone()).collect(), 0)).collect()
}

fn sequence_map(h: &Host<'_>) -> Result<Vec<Value>, Refusal> {
    let body = h.node.graph("body")?;
    let first = h.value(0)?.sequence()?;
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); body.outputs().len()];
    for i in 0..first.len() {
        let mut operands = Vec::new();
        for value in h.inputs.iter().flatten() {
            operands.push(Some(match value {
                Value::Sequence(items) => match items.get(i) {
                    Some(item) => item.clone(),
                    None => return invalid("the sequences differ in length"),
                },
                other => other.clone(),
            }));
        }
        let values = run_program(h, "body", body, operands)?;
        results.iter_mut().zip(values).for_each(|(all, value)| all.push(value));
    }
    Ok(results.into_iter().map(Value::Sequence).collect())
}
