//! Plans of every golden checkpoint at several capacities: verified, tight, and the same after a trip through text.

use crate::goldens::{folders, name_of, open};
use rlx::backend::Backend;
use rlx::backend::cpu::CpuBackend;
use rlx::plan::{BindingManifest, BufferKind, Template, parse_lir};
use rlx_graph::passes::{PassOptions, compile_passes};
use rlx_kernels::isa::Isa;
use rlx_tensor::DimBinding;
use std::sync::Arc;

/// Rows, sequences, rows of logits, blocks of the cache, blocks of a sequence's table.
const CAPACITIES: [[usize; 5]; 5] =
    [[1, 1, 1, 1, 1], [7, 2, 2, 4, 2], [128, 1, 1, 4, 4], [512, 16, 16, 64, 4], [1000, 32, 5, 8, 8]];

fn binding(template: &Template, capacities: [usize; 5]) -> DimBinding {
    let names = ["rows", "batch", "outs", "blocks", "table", "window_blocks"];
    let capacities = [&capacities[..], &[capacities[3].div_ceil(2)]].concat();
    let mut binding = DimBinding::new();
    for symbol in template.sizes().symbols() {
        let at = names.iter().position(|&name| name == symbol.name());
        let at = at.unwrap_or_else(|| panic!("the test gives {symbol} no value"));
        binding = binding.with(symbol.name(), capacities[at]);
    }
    binding
}

/// Everything about the checkpoints' plans in one pass over them: building the graphs is what takes time.
#[test]
fn plans_of_every_checkpoint_are_verified_tight_and_read_back() {
    let backend = CpuBackend::new(Isa::Scalar, 1);
    let mut worst = (1.0, String::new());
    for folder in folders() {
        let name = name_of(&folder);
        let (built, _) = open(&folder);
        let passed = compile_passes(built.graph(), backend.target(), &PassOptions::default());
        let (legal, _) = passed.unwrap_or_else(|e| panic!("{name}: {e}"));
        let template = Arc::new(Template::build(&legal, backend.plan_target()).unwrap());
        for (at, capacities) in CAPACITIES.into_iter().enumerate() {
            let lir = template.specialize(&binding(&template, capacities)).unwrap();
            assert_eq!(lir.verify(), Ok(()), "{name} at {capacities:?}");
            let bound = lir.live_bytes_bound();
            let ratio = lir.arena_bytes() as f64 / bound.max(1) as f64;
            assert!(
                ratio <= 1.05,
                "{name} at {capacities:?}: the arena has {} bytes, {bound} live at once",
                lir.arena_bytes()
            );
            if ratio > worst.0 {
                worst = (ratio, format!("{name} at {capacities:?}"));
            }
            let manifest = BindingManifest::from_lir(&lir);
            let of = |entries: &[rlx::plan::ManifestEntry]| entries.iter().map(|e| e.bytes).sum::<usize>();
            let inputs = template.buffers().iter().enumerate();
            let inputs = inputs.filter(|(_, b)| matches!(b.kind, BufferKind::Input(_)));
            let bytes: usize = inputs.map(|(_, b)| lir.capacities()[b.bytes.index()]).sum();
            assert_eq!(of(&manifest.inputs), bytes, "{name}");
            if at == 1 {
                let text = lir.to_string();
                let again = parse_lir(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(again.to_string(), text, "{name}");
                assert_eq!(again.arena_bytes(), lir.arena_bytes(), "{name}");
            }
        }
    }
    println!("largest arena over the live-bytes bound: {:.3} ({})", worst.0, worst.1);
}
