//! Tiles: what the verifier refuses of them, and what the interpreter finds when a kernel is run without having been verified.

use crate::ir::build::Builder;
use crate::ir::interpret::Machine;
use crate::ir::verify::verify;
use crate::ir::{Access, BinaryFn, Binding, Element, Kernel, Placement, Storage, Value};

const LANES: u32 = 8;

/// Each lane puts its number at `put`, and takes what stands at `take`; where there are barriers `put` says.
fn exchange(
    words: u32,
    barriers: [bool; 2],
    put: impl Fn(&mut Builder, Value) -> Value,
    take: impl Fn(&mut Builder, Value) -> Value,
) -> Kernel {
    let mut b = Builder::new("exchange", LANES);
    let count = b.known(LANES as i32);
    let out = b.view(Binding::Arena, Storage::Word(Element::I32), Access::Write, &[count]);
    let tile = b.tile(Element::I32, words);
    let (zero, turns, lane) = (b.int(0), b.int(2), b.lane());
    let firsts = [zero];
    let (index, params) = b.open_loop(&firsts);
    if barriers[0] {
        b.barrier();
    }
    let at = put(&mut b, lane);
    let value = b.add(lane, index);
    b.put(tile, at, &[value]);
    if barriers[1] {
        b.barrier();
    }
    let at = take(&mut b, lane);
    let taken = b.take(tile, at, 1)[0];
    let next = b.add(params[0], taken);
    let sums = b.close_loop([zero, turns], 1, index, &firsts, &params, &[next]);
    b.store(out, &[lane], sums[0], None);
    b.finish()
}

fn same(_: &mut Builder, lane: Value) -> Value {
    lane
}

fn mirrored(b: &mut Builder, lane: Value) -> Value {
    let last = b.int(LANES as i32 - 1);
    b.sub(last, lane)
}

fn halved(b: &mut Builder, lane: Value) -> Value {
    let two = b.int(2);
    b.div(lane, two)
}

fn run(kernel: &Kernel) -> Result<Vec<u32>, &'static str> {
    let mut machine = Machine::new(64);
    let placed = [Placement { base: 0, strides: vec![1] }];
    let arguments = kernel.arguments(&[], &placed).unwrap();
    machine.run(kernel, &arguments, &[], &mut [], 1).map_err(|v| v.what)?;
    Ok(machine.words(0, LANES as usize).to_vec())
}

#[test]
fn lanes_exchange_words_between_barriers() {
    let kernel = exchange(LANES, [true, true], same, mirrored);
    verify(&kernel).unwrap();
    assert_eq!(run(&kernel).unwrap(), [15, 13, 11, 9, 7, 5, 3, 1]);
}

#[test]
fn a_word_that_passes_between_lanes_without_a_barrier_is_refused_and_found() {
    for (barriers, reason, what) in [
        ([true, false], "is taken from without a barrier after a put", "taken while another lane puts it"),
        // Only a second turn shows it.
        ([false, true], "is put to without a barrier after it was taken", "put while another lane uses it"),
    ] {
        let kernel = exchange(LANES, barriers, same, mirrored);
        let error = verify(&kernel).unwrap_err();
        assert!(error.reason.contains(reason), "{error}");
        let found = run(&kernel).unwrap_err();
        // Lanes run in step, so that a lane may also find a word that none has put yet.
        assert!(found == what || found == "taken before anything was put", "{found}");
    }
}

#[test]
fn two_lanes_that_put_one_word_are_refused_and_found() {
    let kernel = exchange(LANES, [true, true], halved, same);
    assert!(verify(&kernel).unwrap_err().reason.contains("two lanes put word 0"));
    assert_eq!(run(&kernel).unwrap_err(), "put while another lane uses it");
}

#[test]
fn a_word_outside_a_tile_is_refused_and_found() {
    let beyond = |b: &mut Builder, lane: Value| {
        let one = b.int(1);
        b.add(lane, one)
    };
    let kernel = exchange(LANES, [true, true], same, beyond);
    assert!(verify(&kernel).unwrap_err().reason.contains("is not known to be 1 words of tile0"));
    assert_eq!(run(&kernel).unwrap_err(), "outside the tile");
    let kernel = exchange(LANES - 1, [true, true], same, |b, _| b.int(0));
    assert!(verify(&kernel).unwrap_err().reason.contains("lane 7 puts 1 words at 7 of 7"));
    assert_eq!(run(&kernel).unwrap_err(), "outside the tile");
}

#[test]
fn a_word_that_nobody_put_is_found() {
    let kernel = exchange(2 * LANES, [true, true], same, |b, lane| {
        let by = b.int(LANES as i32);
        b.add(lane, by)
    });
    verify(&kernel).unwrap();
    assert_eq!(run(&kernel).unwrap_err(), "taken before anything was put");
}

#[test]
fn where_a_lane_puts_must_not_depend_on_data() {
    let kernel = exchange(
        LANES,
        [true, true],
        |b, lane| {
            let (zero, function) = (b.int(0), BinaryFn::Max);
            b.binary(function, lane, zero)
        },
        same,
    );
    assert!(verify(&kernel).unwrap_err().reason.contains("is no function of the lane alone"));
}
