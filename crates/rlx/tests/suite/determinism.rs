//! The promise: equal bits for any number of threads, any batch neighbours, and for prefill as for decode.

use crate::backends::cpu;
use crate::models::{VOCAB, WIDTH, compile, decoder, encoder};
use rlx::{CompiledGraph, State, TensorArg};
use rlx_kernels::isa::Isa;
use rlx_tensor::{DimBinding, Tensor};

/// Tokens of a sequence.
fn tokens(length: usize, seed: usize) -> Vec<i32> {
    (0..length).map(|i| ((i * 37 + seed * 101 + i * i) % VOCAB) as i32).collect()
}

fn vector(values: &[i32]) -> Tensor {
    Tensor::from_slice(&[values.len()], values).unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.as_slice::<f32>().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn starts_of(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut starts = vec![0];
    for length in lengths {
        starts.push(starts.last().unwrap() + length as i32);
    }
    starts
}

/// Hidden rows and pooled rows of a batch, as bits.
fn encode(model: &CompiledGraph, batch: &[Vec<i32>]) -> (Vec<u32>, Vec<u32>) {
    let ids: Vec<i32> = batch.concat();
    let positions: Vec<i32> = batch.iter().flat_map(|s| 0..s.len() as i32).collect();
    let starts = starts_of(batch.iter().map(Vec::len));
    let (ids, positions, starts) = (vector(&ids), vector(&positions), vector(&starts));
    let inputs = [
        ("ids", TensorArg::from(&ids)),
        ("positions", TensorArg::from(&positions)),
        ("seq_starts", TensorArg::from(&starts)),
    ];
    let outputs = model.run(&inputs).unwrap();
    assert!(outputs.iter().all(|(_, t)| t.as_slice::<f32>().unwrap().iter().all(|v| v.is_finite())));
    (bits(&outputs[0].1), bits(&outputs[1].1))
}

/// One run of the decoder: for each sequence its past, its new tokens and the first of its two blocks. Logits as bits.
fn decode(model: &CompiledGraph, state: &mut State, batch: &[(usize, &[i32], i32)]) -> Vec<u32> {
    let ids: Vec<i32> = batch.iter().flat_map(|(_, new, _)| new.iter().copied()).collect();
    let place = |(past, new, _): &(usize, &[i32], i32)| *past as i32..(past + new.len()) as i32;
    let positions: Vec<i32> = batch.iter().flat_map(place).collect();
    let starts = starts_of(batch.iter().map(|(_, new, _)| new.len()));
    let past: Vec<i32> = batch.iter().map(|(past, ..)| *past as i32).collect();
    let table: Vec<i32> = batch.iter().flat_map(|(_, _, block)| [*block, *block + 1]).collect();
    let table = Tensor::from_slice(&[past.len(), 2], &table).unwrap();
    let past = vector(&past);
    let (ids, positions, starts) = (vector(&ids), vector(&positions), vector(&starts));
    let inputs = [
        ("ids", TensorArg::from(&ids)),
        ("positions", TensorArg::from(&positions)),
        ("seq_starts", TensorArg::from(&starts)),
        ("past", TensorArg::from(&past)),
        ("block_table", TensorArg::from(&table)),
    ];
    let outputs = model.run_with(state, &inputs).unwrap();
    assert!(outputs[0].1.as_slice::<f32>().unwrap().iter().all(|v| v.is_finite()));
    bits(&outputs[0].1)
}

fn state(model: &CompiledGraph, sequences: usize) -> State {
    model.new_state(&DimBinding::new().with("blocks", 2 * sequences)).unwrap()
}

fn ragged(count: usize) -> Vec<Vec<i32>> {
    (0..count).map(|i| tokens(1 + (i * 7 + 3) % 13, i)).collect()
}

#[test]
fn threads_do_not_change_a_bit() {
    for isa in Isa::available() {
        let mut first = None;
        for threads in 1..=3 {
            let session = cpu(isa, threads);
            let encoder = compile(&session, &encoder().unwrap());
            let encoded = encode(&encoder, &ragged(9));
            let session = cpu(isa, threads);
            let decoder = compile(&session, &decoder().unwrap());
            let mut state = state(&decoder, 2);
            let (a, b) = (tokens(70, 1), tokens(5, 2));
            let prefill = decode(&decoder, &mut state, &[(0, &a, 0), (0, &b, 2)]);
            let next = decode(&decoder, &mut state, &[(70, &[3], 0), (5, &[4], 2)]);
            let found = (encoded, prefill, next);
            assert!(first.is_none() || first.as_ref() == Some(&found), "{isa}, {threads} threads");
            first = Some(found);
        }
    }
}

#[test]
fn batch_neighbours_do_not_change_a_bit() {
    for isa in Isa::available() {
        let session = cpu(isa, 2);
        let encoder = compile(&session, &encoder().unwrap());
        let session = cpu(isa, 2);
        let decoder = compile(&session, &decoder().unwrap());
        let sequences = ragged(17);
        let alone: Vec<_> = sequences.iter().map(|s| encode(&encoder, std::slice::from_ref(s))).collect();
        let decoded: Vec<_> =
            sequences.iter().map(|s| decode(&decoder, &mut state(&decoder, 1), &[(0, s, 0)])).collect();
        for count in 2..=17 {
            let (hidden, pooled) = encode(&encoder, &sequences[..count]);
            let want: Vec<u32> = alone[..count].iter().flat_map(|(h, _)| h.iter().copied()).collect();
            assert!(hidden == want, "{isa}: hidden rows of {count} sequences");
            let want: Vec<u32> = alone[..count].iter().flat_map(|(_, p)| p.iter().copied()).collect();
            assert!(
                pooled == want && pooled.len() == count * WIDTH,
                "{isa}: pooled rows of {count} sequences"
            );
            let batch: Vec<(usize, &[i32], i32)> =
                sequences[..count].iter().enumerate().map(|(i, s)| (0, s.as_slice(), 2 * i as i32)).collect();
            let logits = decode(&decoder, &mut state(&decoder, count), &batch);
            assert!(logits == decoded[..count].concat(), "{isa}: logits of {count} sequences");
        }
    }
}

#[test]
fn prefill_and_decode_agree_in_every_bit() {
    for isa in Isa::available() {
        let session = cpu(isa, 2);
        let decoder = compile(&session, &decoder().unwrap());
        let sequence = tokens(72, 5);
        let whole = decode(&decoder, &mut state(&decoder, 1), &[(0, &sequence, 0)]);
        for chunk in [1, 7, 65] {
            let mut state = state(&decoder, 1);
            let mut logits = Vec::new();
            for (i, part) in sequence.chunks(chunk).enumerate() {
                logits.extend(decode(&decoder, &mut state, &[(i * chunk, part, 0)]));
            }
            assert!(logits == whole, "{isa}: prefill in chunks of {chunk}");
        }
    }
}
