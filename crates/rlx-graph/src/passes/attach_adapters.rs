//! Linear layers make room for adapters.
//!
//! Needs: fused linear layers, the inputs of [`AdapterLayout::with_inputs`]. Does: where the options have a layout of adapters, layers
//! become the same layers with updates. Leaves: layers whose weights the layout does not list, and everything where there is none.

use crate::adapters::{AdapterLayout, SCALES, factors_input, named, rows_of, slots_input};
use crate::ids::{NodeId, ValueId};
use crate::ops::linear::Linear;
use crate::ops::lora_linear::LoraLinear;
use crate::passes::{PassCx, PassError};
use crate::rewrite::{Draft, Match, Patch, Rule, pat};
use std::sync::Arc;

pub(crate) fn run(draft: &mut Draft, cx: &mut PassCx<'_>) -> Result<(), PassError> {
    match &cx.options.adapters {
        Some(layout) => {
            let rules = rules(Arc::clone(layout));
            cx.rewrite(draft, &rules)
        }
        None => Ok(()),
    }
}

/// The rule of this pass for a layout.
pub fn rules(layout: Arc<AdapterLayout>) -> Vec<Rule> {
    vec![Rule::new(
        "attach_adapters",
        "x W -> x W + scale (x A) B",
        pat::op::<Linear>(),
        move |draft: &Draft, m: &Match| attach(draft, m.root(), m.result(draft)?, &layout),
    )]
}

fn attach(draft: &Draft, node: NodeId, result: ValueId, layout: &AdapterLayout) -> Option<Patch> {
    let node = draft.node(node);
    let linear = node.op().downcast::<Linear>()?;
    let find = |name: &str| named(draft.interface().filter_map(|v| Some((v, draft.value_name(v)?))), name);
    let site = |weight: &ValueId| layout.sites().get(draft.value_name(*weight)?);
    let sites: Vec<_> = node.inputs()[1..=linear.parts].iter().map(site).collect::<Option<_>>()?;
    let slots = find(&slots_input(&rows_of(draft.shape(node.inputs()[0]))?))?;
    let mut operands = node.inputs().to_vec();
    operands.extend([slots, find(SCALES)?]);
    for slot in 0..layout.slots {
        operands.push(find(&factors_input(slot))?);
    }
    let (indices, columns) = sites.iter().map(|site| (site.index, site.column)).unzip();
    Some(Patch::with_op(result, LoraLinear::over(linear, layout.slots, indices, columns), &operands))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::passes::{OpSet, PassOptions, compile_passes};
    use rlx_tensor::DType;

    const LAYERS: &str = r#"graph "g" {
  input @x : f32[rows, 4]
  param @gate : f32[3, 4]
  param @up : f32[3, 4]
  param @down : f32[4, 3]
  %4 : f32[rows, 3] = linear(@x, @gate) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %5 : f32[rows, 3] = linear(@x, @up) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  %6 : f32[rows, 3] = gated(%4, %5) {activation=silu}
  %7 : f32[rows, 4] = linear(%6, @down) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false}
  return "y": %7
}"#;

    #[test]
    fn fused_layers_take_adapters_and_keep_their_form() {
        let before: Graph = LAYERS.parse().unwrap();
        let layout = Arc::new(AdapterLayout::of(&before, 2, DType::F32));
        assert_eq!((layout.width(), layout.sites().len(), layout.sites()["up"].column), (21, 3, 7));
        let options = PassOptions { adapters: Some(Arc::clone(&layout)), ..PassOptions::default() };
        let (graph, _) = compile_passes(&before, &OpSet::every_op("all"), &options).unwrap();
        insta::assert_snapshot!(graph, @r#"
        graph "g" {
          input @x : f32[rows, 4]
          param @gate : f32[3, 4]
          param @up : f32[3, 4]
          param @down : f32[4, 3]
          input @adapter_slots.rows : i32[rows]
          input @adapter_scales : f32[2, 3]
          input @adapter.0 : f32[adapter_rank_0, 21]
          input @adapter.1 : f32[adapter_rank_1, 21]
          %8 : f32[rows, 3] = lora_linear(@x, @gate, @up, @adapter_slots.rows, @adapter_scales, @adapter.0, @adapter.1) {parts=2, transposed=false, bias=false, activation=silu, gated=true, residual=false, slots=2, sites=[0, 1], columns=[0, 7]}
          %9 : f32[rows, 4] = lora_linear(%8, @down, @adapter_slots.rows, @adapter_scales, @adapter.0, @adapter.1) {parts=1, transposed=false, bias=false, activation=identity, gated=false, residual=false, slots=2, sites=[2], columns=[14]}
          return "y": %9
        }
        "#);
        let (plain, _) = compile_passes(&before, &OpSet::every_op("all"), &PassOptions::default()).unwrap();
        assert_eq!(plain.inputs().count(), 1);
        assert_eq!(plain.nodes().len(), graph.nodes().len());
    }
}
