//! The fuzz target of GGUF headers without a fuzzer: seeded inputs, the target's own recipe and checks.

#[path = "../../../../fuzz/recipes/gguf.rs"]
mod recipe;

#[path = "../../../../fuzz/recipes/random.rs"]
mod random;

use random::Random;

impl Random {
    /// A byte that is often small: counts of a recipe that build something.
    fn byte(&mut self) -> u8 {
        let word = self.word();
        if word & 1 == 0 { (word >> 8) as u8 } else { (word >> 8) as u8 & 7 }
    }
}

/// Changes, cuts or doubles a few bytes.
fn mutate(random: &mut Random, input: &mut Vec<u8>) {
    match random.below(3) {
        0 => input.extend((0..random.below(40)).map(|_| random.byte())),
        1 => input.truncate(random.below(input.len()) + 1),
        _ => input.extend_from_within(random.below(input.len())..),
    }
    for _ in 0..random.below(4) {
        let at = random.below(input.len());
        input[at] = random.byte();
    }
}

/// How many of `executions` inputs were accepted: recipes, each from the last one that was, and mutated files of these.
fn accepted(seed: u64, executions: usize) -> usize {
    let (mut random, mut kept, mut accepted) = (Random(seed), vec![1u8], 0);
    for _ in 0..executions {
        let mut input = if random.below(4) == 0 { vec![1] } else { kept.clone() };
        mutate(&mut random, &mut input);
        input.truncate(200);
        input[0] = 1;
        if random.below(4) == 0
            && let Some(mut file) = recipe::file_of(&kept[1..])
        {
            mutate(&mut random, &mut file);
            accepted += usize::from(recipe::check(&file));
        } else if recipe::run(&input) {
            accepted += 1;
            kept = input;
        }
    }
    accepted
}

#[test]
fn mutated_gguf_files_are_refused_or_sound() {
    let accepted = accepted(1, 20_000);
    println!("{accepted} of 20,000 accepted");
    assert!((1_000..19_000).contains(&accepted), "the inputs test one side only: {accepted} accepted");
}

#[test]
#[ignore = "minutes: the same with ten million inputs"]
fn ten_million_mutated_gguf_files_are_refused_or_sound() {
    let seeds = 2..12;
    let accepted: usize = seeds.map(|seed| accepted(seed, 1_000_000)).sum();
    println!("{accepted} of 10,000,000 accepted");
}
