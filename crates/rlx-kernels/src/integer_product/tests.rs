use super::*;

fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Ends of the range are frequent: they are where narrow sums would saturate.
        match state >> 61 {
            0 => 0u8,
            1 => 0x7f,
            2 => 0x80,
            3 => 0xff,
            _ => (state >> 40) as u8,
        }
    };
    (0..count).map(|_| next()).collect()
}

fn code(byte: u8, signed: bool) -> i32 {
    if signed { i32::from(byte as i8) } else { i32::from(byte) }
}

/// A layer with its operands, and what the definition says.
struct Example {
    layer: ConvLayer,
    images: Images,
    x: Vec<u8>,
    x_signed: bool,
    x_zero: u8,
    w: Vec<u8>,
    w_signed: bool,
    zeros: Vec<i32>,
    scale: Vec<f32>,
    bias: Vec<f32>,
    whole: Vec<i32>,
}

impl Example {
    fn new(
        layer: ConvLayer,
        batch: usize,
        extents: [usize; 2],
        [x_signed, w_signed]: [bool; 2],
        zeros: usize,
    ) -> Self {
        let positions = [0, 1].map(|axis| layer.positions(axis, extents[axis]).expect("the window fits"));
        let (n, k) = (layer.outputs, layer.k());
        let own = bytes(zeros, 5).into_iter().map(|byte| code(byte, w_signed)).collect();
        Example {
            layer,
            images: Images { batch, extents, positions },
            x: bytes(batch * extents[0] * extents[1] * layer.channels, 1 + k as u64),
            x_signed,
            x_zero: if x_signed { 0xfd } else { 131 },
            w: bytes(n * k, 2 + n as u64),
            w_signed,
            zeros: own,
            scale: (0..n).map(|i| 1e-3 + i as f32 * 3e-5).collect(),
            bias: (0..n).map(|i| i as f32 * 0.7 - 3.0).collect(),
            whole: (0..n).map(|i| i as i32 * 91 - 700).collect(),
        }
    }

    /// The sums by definition, without bias.
    fn sums(&self) -> Vec<i32> {
        let (layer, images) = (&self.layer, &self.images);
        let zero = code(self.x_zero, self.x_signed);
        let taps = layer.window[0] * layer.window[1];
        let mut sums = Vec::new();
        for pixel in 0..images.batch * images.positions[0] * images.positions[1] {
            let per_image = images.positions[0] * images.positions[1];
            let at = [pixel % per_image / images.positions[1], pixel % images.positions[1]];
            for n in 0..layer.outputs {
                let own = self.zeros.get(n).or(self.zeros.first()).copied().unwrap_or(0);
                let mut sum = 0;
                for tap in 0..taps {
                    let window = [tap / layer.window[1], tap % layer.window[1]];
                    let place = [0, 1].map(|axis| {
                        let padded = at[axis] * layer.strides[axis] + window[axis] * layer.dilations[axis];
                        padded.checked_sub(layer.before[axis]).filter(|&i| i < images.extents[axis])
                    });
                    let [Some(y), Some(x)] = place else { continue };
                    let first = ((pixel / per_image * images.extents[0] + y) * images.extents[1] + x)
                        * layer.channels;
                    for channel in 0..layer.channels {
                        let input = code(self.x[first + channel], self.x_signed) - zero;
                        let weight = self.w[(n * layer.channels + channel) * taps + tap];
                        sum += input * (code(weight, self.w_signed) - own);
                    }
                }
                sums.push(sum);
            }
        }
        sums
    }

    fn run(&self, set: DotSet, threads: usize, outcome: Outcome, biased: bool) -> Vec<u8> {
        let kernel = IntegerKernel::of_set(set, self.layer).expect("the set is available");
        let pool = Pool::new(threads);
        let order = CodeOrder::windows(
            self.layer.outputs,
            self.layer.channels,
            self.layer.window[0] * self.layer.window[1],
        );
        let weights = kernel.pack(&pool, &self.w, &order, self.w_signed, &self.zeros).expect("sizes fit");
        assert_eq!(
            weights.bytes(),
            pack::packed_bytes(weights.n(), kernel.row_bytes(), kernel.strips).expect("small")
        );
        let images = self.images;
        let count = images.batch * images.positions[0] * images.positions[1] * self.layer.outputs;
        let bytes = if matches!(outcome, Outcome::I32 | Outcome::F32) { 4 } else { 1 };
        // One byte more shows what is written behind the end.
        let mut out = vec![0xaa; count * bytes + 1];
        let coded = bytes == 1;
        let whole = biased && !coded && outcome == Outcome::I32;
        let codes = if outcome == Outcome::I8 { [3.0, -100.0, 127.0] } else { [130.0, 0.0, 250.0] };
        let scratch = AlignedScratch::new(kernel.scratch_bytes(), threads);
        let start = Shared(out.as_mut_ptr());
        pool.run(|team| {
            let args = IntegerArgs {
                images,
                x: self.x.as_ptr(),
                x_stride: self.layer.channels,
                x_signed: self.x_signed,
                x_zero: self.x_zero,
                weights: &weights,
                scale: &self.scale,
                step: if coded { 0.37 } else { 1.0 },
                whole_bias: if whole { &self.whole } else { &[] },
                bias: if biased && !whole { &self.bias } else { &[] },
                outcome,
                codes,
                out: start.at(),
                out_stride: self.layer.outputs,
            };
            let (grid, mut held) = (kernel.grid(&args, threads), usize::MAX);
            for tile in team.tiles(grid.tiles()) {
                // SAFETY: the vectors have the sizes of the layer and its images; the scratch is the worker's.
                unsafe { kernel.run_tile(&args, &grid, tile, scratch.of(team.index()), &mut held) };
            }
        });
        assert_eq!(out.pop(), Some(0xaa));
        out
    }

    /// What the definition says of a result.
    fn expected(&self, outcome: Outcome, biased: bool) -> Vec<u8> {
        let n = self.layer.outputs;
        let mut out = Vec::new();
        for (index, sum) in self.sums().into_iter().enumerate() {
            let column = index % n;
            let coded = !matches!(outcome, Outcome::I32 | Outcome::F32);
            if outcome == Outcome::I32 {
                out.extend((sum + if biased { self.whole[column] } else { 0 }).to_ne_bytes());
                continue;
            }
            let step = if coded { 0.37 } else { 1.0 };
            let mut y = sum as f32 * (self.scale[column] / step);
            if biased {
                y += self.bias[column] / step;
            }
            match outcome {
                Outcome::F32 => out.extend(y.to_ne_bytes()),
                Outcome::U8 => out.push((y.round_ties_even() + 130.0).clamp(0.0, 250.0) as u8),
                _ => out.push((y.round_ties_even() + 3.0).clamp(-100.0, 127.0) as i8 as u8),
            }
        }
        out
    }
}

struct Shared(*mut u8);

// SAFETY: tiles are disjoint.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self) -> *mut u8 {
        self.0
    }
}

struct AlignedScratch {
    each: usize,
    start: Shared,
    _buffer: crate::aligned::AlignedBuf,
}

impl AlignedScratch {
    fn new(bytes: usize, threads: usize) -> Self {
        let each = bytes.next_multiple_of(64);
        let mut buffer = crate::aligned::AlignedBuf::zeroed(each * threads).expect("a small buffer");
        let start = Shared(buffer.bytes_mut().as_mut_ptr());
        AlignedScratch { each, start, _buffer: buffer }
    }

    fn of(&self, index: usize) -> *mut u8 {
        self.start.at().wrapping_add(index * self.each)
    }
}

fn sets() -> impl Iterator<Item = DotSet> {
    DotSet::ALL.into_iter().filter(|set| set.is_available())
}

fn windows(
    channels: usize,
    outputs: usize,
    window: [usize; 2],
    [strides, dilations]: [[usize; 2]; 2],
    ends: [usize; 2],
) -> ConvLayer {
    ConvLayer {
        window,
        strides,
        dilations,
        before: ends,
        after: [ends[1], ends[0]],
        groups: 1,
        channels,
        outputs,
    }
}

#[test]
fn every_set_and_cut_gives_the_bits_of_the_definition() {
    let ones = [[1; 2]; 2];
    let layers = [
        (matrix_layer(1, 1), 1, [1, 1]),
        (matrix_layer(33, 7), 1, [1, 13]),
        (matrix_layer(70, 64), 1, [1, 131]),
        (matrix_layer(16, 1030), 1, [1, 3]),
        (windows(5, 19, [3, 3], ones, [1, 1]), 2, [6, 7]),
        (windows(8, 33, [3, 2], [[2, 1], [1, 2]], [0, 2]), 1, [9, 8]),
        (windows(4, 20, [3, 3], ones, [1, 1]), 2, [9, 30]),
        (windows(8, 17, [3, 3], [[2, 2], [2, 1]], [1, 2]), 1, [11, 13]),
        (windows(4, 40, [1, 1], [[2, 2], [1, 1]], [0, 0]), 2, [5, 6]),
        (windows(3, 8, [7, 7], [[2, 2], [1, 1]], [3, 3]), 1, [20, 21]),
    ];
    for (layer, batch, extents) in layers {
        for signs in [[false, true], [true, true], [false, false], [true, false]] {
            for zeros in [0, 1, layer.outputs] {
                let example = Example::new(layer, batch, extents, signs, zeros);
                for (outcome, biased) in [
                    (Outcome::I32, false),
                    (Outcome::I32, true),
                    (Outcome::F32, true),
                    (Outcome::U8, true),
                    (Outcome::I8, false),
                ] {
                    let wanted = example.expected(outcome, biased);
                    for set in sets() {
                        for threads in [1, 3] {
                            let found = example.run(set, threads, outcome, biased);
                            assert_eq!(
                                found, wanted,
                                "{layer:?} {signs:?} {zeros} {outcome:?} {set:?} {threads}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_largest_sums_do_not_saturate() {
    let layer = matrix_layer(32, MAX_INPUTS);
    let mut example = Example::new(layer, 1, [1, 2], [false, true], 0);
    example.x.fill(255);
    example.x_zero = 0;
    for (fill, wanted) in [(0x7f, 127), (0x80, -128)] {
        example.w.fill(fill);
        for set in sets() {
            let found = example.run(set, 1, Outcome::I32, false);
            let sums = found.chunks_exact(4).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            assert!(sums.into_iter().all(|sum| sum == 255 * wanted * MAX_INPUTS as i32), "{set:?}");
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let isa = Isa::detect();
    assert!(IntegerKernel::select(isa, matrix_layer(4, MAX_INPUTS + 1)).is_none());
    assert!(IntegerKernel::select(isa, matrix_layer(0, 4)).is_none());
    let kernel = IntegerKernel::select(isa, matrix_layer(4, 4)).expect("it fits");
    let pool = Pool::new(1);
    assert!(kernel.pack(&pool, &[0; 16], &CodeOrder::matrix(4, 4, false), true, &[1, 2]).is_none());
    assert!(kernel.pack(&pool, &[0; 15], &CodeOrder::matrix(4, 4, false), true, &[]).is_none());
    assert!(kernel.pack(&pool, &[0; 20], &CodeOrder::matrix(5, 4, true), true, &[]).is_none());
}
