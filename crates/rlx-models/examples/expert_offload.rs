//! A mixture of experts within a budget: resident bytes, hit rate and speed with 1, 2, 4, .. experts of each layer in memory, and what
//! each policy would have moved.
//!
//! ```text
//! cargo run --release -p rlx-models --example expert_offload [MODEL [TOKENS [BUDGET..]]]
//! ```

use rlx::memory::experts::{ExpertPolicy, replay};
use rlx_models::{Model, OpenOptions, TextOptions};
use std::error::Error;
use std::time::Instant;

const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<(), Box<dyn Error>> {
    run(std::env::args().skip(1))
}

fn run(mut args: impl Iterator<Item = String>) -> Result<(), Box<dyn Error>> {
    let folder = args.next().unwrap_or_else(|| "models/demo-moe".to_owned());
    let tokens: usize = args.next().map_or(Ok(48), |tokens| tokens.parse())?;
    let all = Model::open(&folder)?.experts_in_all().ok_or("the model has no experts")?;
    let mut budgets = args.map(|budget| budget.parse()).collect::<Result<Vec<usize>, _>>()?;
    if budgets.is_empty() {
        budgets =
            std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < all.num_experts).collect();
        budgets.push(all.num_experts);
    }
    println!(
        "{folder}: {} layers of {} experts of {} bytes",
        all.num_moe_layers, all.num_experts, all.expert_param_bytes
    );
    println!("experts  resident MiB  estimated  hit rate  MiB moved  stalled ms  tokens/s");
    let (mut trace, mut first_text) = (None, None);
    for budget in budgets {
        let options = OpenOptions { expert_budget: Some(budget), ..OpenOptions::default() };
        let model = Model::open_with(&folder, &options)?;
        let pool = model.experts().ok_or("the model has no pool")?;
        model.compiled().program()?;
        pool.start_trace();
        let text_options = TextOptions { max_tokens: tokens, ..TextOptions::default() };
        let started = Instant::now();
        let mut generation = model.generate("Once upon a time", &text_options)?;
        let text = generation.by_ref().collect::<Result<String, _>>()?;
        let seconds = started.elapsed().as_secs_f64();
        let stats = pool.stats();
        println!(
            "{budget:7} {:13.2} {:10.2} {:8.1}% {:10.1} {:11.1} {:9.1}",
            stats.resident_bytes as f64 / MIB,
            all.with_budget(budget).resident_expert_weight_bytes as f64 / MIB,
            100.0 * stats.hits as f64 / (stats.hits + stats.misses).max(1) as f64,
            stats.bytes_moved as f64 / MIB,
            stats.stall_nanos as f64 / 1e6,
            generation.token_ids().len() as f64 / seconds,
        );
        if *first_text.get_or_insert_with(|| text.clone()) != text {
            return Err(format!("with {budget} experts the text is another one: {text}").into());
        }
        trace = pool.take_trace();
    }
    let Some(trace) = trace else { return Ok(()) };
    println!("\nMiB moved in a replay, by slots:");
    println!("slots        lru        lfu hysteresis   lru with prefetch");
    for slots in (1..=all.num_experts).filter(|slots| slots.is_power_of_two()) {
        let mib = |policy, prefetch| replay(&trace, policy, slots, prefetch).bytes_moved as f64 / MIB;
        let [lru, lfu, hysteresis] = ExpertPolicy::ALL.map(|policy| mib(policy, false));
        println!("{slots:5} {lru:10.1} {lfu:10.1} {hysteresis:10.1} {:10.1}", mib(ExpertPolicy::Lru, true));
    }
    Ok(())
}

#[test]
fn it_runs() -> Result<(), Box<dyn Error>> {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo-moe");
    run([demo, "6", "1", "2"].map(str::to_owned).into_iter())
}
