use super::*;
use crate::aligned::AlignedBuf;
use crate::gemm::{PackedMatrix, Precision, WeightOrder, WeightPart, pack};
use crate::pool::Pool;

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

struct Problem {
    layer: ConvLayer,
    images: Images,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    addend: Vec<f32>,
}

impl Problem {
    fn new(layer: ConvLayer, batch: usize, extents: [usize; 2]) -> Self {
        let positions = [0, 1].map(|axis| layer.positions(axis, extents[axis]).unwrap());
        let images = Images { batch, extents, positions };
        let (channels, outputs) = (layer.groups * layer.channels, layer.groups * layer.outputs);
        let x = values(batch * extents[0] * extents[1] * channels, 1);
        let w = values(outputs * layer.k(), 2);
        let addend = values(batch * positions[0] * positions[1] * outputs, 4);
        Self { layer, images, x, w, bias: values(outputs, 3), addend }
    }

    /// In the order of the contract.
    fn expected(&self) -> Vec<f32> {
        if self.layer.is_winograd() { self.expected_of_tiles() } else { self.expected_of_windows() }
    }

    /// An element of an image; zero outside.
    fn element(&self, image: usize, [y, x]: [usize; 2], channel: usize) -> f32 {
        let ([height, width], before) = (self.images.extents, self.layer.before);
        let inside =
            (before[0]..height + before[0]).contains(&y) && (before[1]..width + before[1]).contains(&x);
        let at = || ((image * height + y - before[0]) * width + x - before[1]) * self.layer.channels;
        if inside { self.x[at() + channel] } else { 0.0 }
    }

    /// One output by Winograd's transformation.
    fn output_of_tile(&self, image: usize, [y, x]: [usize; 2], output: usize) -> f32 {
        let channels = self.layer.channels;
        let spread = |d: [f32; 4]| [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]];
        let weights = |w: [f64; 3]| [w[0], (w[0] + w[2] + w[1]) * 0.5, (w[0] + w[2] - w[1]) * 0.5, w[2]];
        let gather = |m: [f32; 4]| [m[0] + m[1] + m[2], m[1] - m[2] - m[3]];
        let four = [0, 1, 2, 3];
        let mut sums = [[0.0f32; 4]; 4];
        for channel in 0..channels {
            let window = &self.w[(output * channels + channel) * 9..][..9];
            let w = [0, 1, 2].map(|j| weights([0, 1, 2].map(|i| f64::from(window[i * 3 + j]))));
            let w = four.map(|i| weights([0, 1, 2].map(|j| w[j][i])));
            let d = four
                .map(|j| spread(four.map(|i| self.element(image, [y / 2 * 2 + i, x / 2 * 2 + j], channel))));
            let d = four.map(|i| spread(four.map(|j| d[j][i])));
            for (i, row) in sums.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = d[i][j].mul_add(w[i][j] as f32, *sum);
                }
            }
        }
        let columns = four.map(|j| gather(four.map(|i| sums[i][j])));
        gather(four.map(|j| columns[j][y % 2]))[x % 2]
    }

    fn expected_of_tiles(&self) -> Vec<f32> {
        let ([height, width], outputs) = (self.images.positions, self.layer.outputs);
        let mut y = Vec::new();
        for (at, addend) in self.addend.iter().enumerate() {
            let (pixel, output) = (at / outputs, at % outputs);
            let (line, column) = (pixel / width, pixel % width);
            let sum = self.output_of_tile(line / height, [line % height, column], output);
            y.push((sum + self.bias[output] + addend).max(0.0));
        }
        y
    }

    /// By the definition.
    fn expected_of_windows(&self) -> Vec<f32> {
        let (layer, images) = (&self.layer, &self.images);
        let (channels, outputs) = (layer.groups * layer.channels, layer.groups * layer.outputs);
        let [height, width] = images.extents;
        let taps = layer.window[0] * layer.window[1];
        let mut y = Vec::new();
        for pixel in 0..images.batch * images.positions[0] * images.positions[1] {
            let (row, column) = (pixel / images.positions[1], pixel % images.positions[1]);
            let (image, row) = (row / images.positions[0], row % images.positions[0]);
            for output in 0..outputs {
                let group = output / layer.outputs;
                let mut acc = 0.0f32;
                for tap in 0..taps {
                    let (dy, dx) = (tap / layer.window[1], tap % layer.window[1]);
                    let at_y = row * layer.strides[0] + dy * layer.dilations[0];
                    let at_x = column * layer.strides[1] + dx * layer.dilations[1];
                    let inside = (layer.before[0]..height + layer.before[0]).contains(&at_y)
                        && (layer.before[1]..width + layer.before[1]).contains(&at_x);
                    for channel in 0..layer.channels {
                        let x = match inside {
                            true => {
                                let line = image * height + at_y - layer.before[0];
                                let at = line * width + at_x - layer.before[1];
                                self.x[at * channels + group * layer.channels + channel]
                            }
                            false => 0.0,
                        };
                        acc = x.mul_add(self.w[(output * layer.channels + channel) * taps + tap], acc);
                    }
                }
                y.push((acc + self.bias[output] + self.addend[pixel * outputs + output]).max(0.0));
            }
        }
        y
    }

    fn packed(&self, isa: Isa) -> PackedMatrix {
        let rows = conv_rows(&self.layer, isa, &self.w).unwrap();
        let bytes: Vec<u8> = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
        let k = conv_layout(&self.layer, isa).unwrap().k();
        let (dtype, order) = (WeightType::F32, WeightOrder::RowMajor);
        let part = WeightPart { bytes: &bytes, dtype, n: rows.len() / k, k, order };
        pack(&[part], false, isa, Precision::F32).unwrap()
    }

    fn run(&self, isa: Isa, threads: usize) -> Vec<f32> {
        let (layer, images) = (self.layer, self.images);
        let channels = layer.groups * layer.channels;
        let outputs = layer.groups * layer.outputs;
        let mut y = vec![f32::NAN; self.addend.len()];
        let out = y.as_mut_ptr() as usize;
        let (bias, addend, addend_stride) =
            (self.bias.as_ptr() as usize, self.addend.as_ptr() as usize, outputs);
        let (x, x_stride, out_stride) = (self.x.as_ptr() as usize, channels, outputs);
        let activation = Activation::Relu;
        let pool = Pool::new(threads);
        if layer.is_depthwise() {
            let w = depthwise_order(&layer, &self.w).unwrap();
            let entry = depthwise_entry(isa).unwrap();
            let w = w.as_ptr() as usize;
            pool.run(|team| {
                let cut = DepthwiseCut::new(&images, layer.groups, team.count());
                let args = DepthwiseArgs {
                    layer,
                    images,
                    x: x as *const f32,
                    x_stride,
                    w: w as *const f32,
                    bias: bias as *const f32,
                    addend: addend as *const f32,
                    addend_stride,
                    out: out as *mut f32,
                    out_stride,
                    activation,
                    cut,
                };
                for tile in team.tiles(cut.tiles) {
                    // SAFETY: the vectors have the sizes of the problem and outlive the run.
                    unsafe { entry(&args, tile) };
                }
            });
            return y;
        }
        let kernel = ConvKernel::select(isa, layer).unwrap();
        let packed = self.packed(isa);
        assert_eq!(kernel.layout(), packed.layout());
        let mut picked = vec![f32::NAN; kernel.picked_bytes(&images) / 4];
        let (kernel, images, x, x_stride) = match kernel.picked(&images) {
            Some((whole, all)) => {
                for line in 0..images.batch * images.positions[0] {
                    // SAFETY: the vectors have the sizes of the problem.
                    unsafe {
                        kernel.pick_line(&images, (x as *const f32, x_stride), line, picked.as_mut_ptr())
                    };
                }
                (whole, all, picked.as_ptr() as usize, kernel.channels())
            }
            None => (kernel, images, x, x_stride),
        };
        let scratch_bytes = kernel.scratch_bytes(&images);
        pool.run(|team| {
            let mut scratch = AlignedBuf::zeroed(scratch_bytes.max(64)).unwrap();
            let args = ConvArgs {
                images,
                x: x as *const f32,
                x_stride,
                w: packed.bytes().as_ptr(),
                bias: bias as *const f32,
                addend: addend as *const f32,
                addend_stride,
                out: out as *mut f32,
                out_stride,
                activation,
            };
            let grid = kernel.grid(&images, team.count());
            let mut held = usize::MAX;
            for tile in team.tiles(grid.tiles()) {
                // SAFETY: the vectors have the sizes of the problem and outlive the run; the scratch is as long as asked.
                unsafe { kernel.run_tile(&args, &grid, tile, scratch.bytes_mut().as_mut_ptr(), &mut held) };
            }
        });
        y
    }
}

fn layer(
    window: [usize; 2],
    strides: [usize; 2],
    ends: [usize; 2],
    channels: usize,
    outputs: usize,
) -> ConvLayer {
    let dilations = [1, 1];
    ConvLayer { window, strides, dilations, before: ends, after: ends, groups: 1, channels, outputs }
}

fn problems() -> Vec<Problem> {
    let square = |channels, outputs| layer([3, 3], [1, 1], [1, 1], channels, outputs);
    vec![
        Problem::new(layer([1, 1], [1, 1], [0, 0], 5, 33), 2, [3, 5]),
        Problem::new(layer([1, 1], [1, 1], [0, 0], 1, 1), 1, [1, 1]),
        Problem::new(layer([1, 1], [2, 2], [0, 0], 7, 31), 2, [5, 8]),
        Problem::new(square(3, 64), 2, [13, 29]),
        Problem::new(square(17, 33), 1, [7, 7]),
        Problem::new(layer([7, 7], [2, 2], [3, 3], 3, 40), 1, [30, 31]),
        Problem::new(layer([3, 2], [1, 3], [0, 0], 4, 9), 2, [6, 9]),
        Problem::new(
            ConvLayer { dilations: [2, 3], after: [1, 4], ..layer([3, 3], [1, 2], [2, 3], 4, 9) },
            2,
            [9, 11],
        ),
        Problem::new(ConvLayer { groups: 3, ..square(2, 5) }, 2, [6, 15]),
        Problem::new(ConvLayer { groups: 2, ..layer([1, 1], [1, 1], [0, 0], 4, 34) }, 2, [4, 4]),
        Problem::new(ConvLayer { groups: 19, ..square(1, 1) }, 2, [9, 10]),
        Problem::new(ConvLayer { groups: 33, ..layer([5, 3], [2, 2], [2, 1], 1, 1) }, 1, [9, 16]),
        Problem::new(ConvLayer { groups: 3, ..square(1, 2) }, 1, [6, 6]),
        Problem::new(ConvLayer { groups: 150, ..square(1, 1) }, 1, [7, 7]),
        Problem::new(ConvLayer { groups: 48, ..layer([3, 3], [2, 2], [1, 1], 1, 1) }, 2, [33, 34]),
        // One line that is cut: with ends, copied; without; strided; shorter than is worth a cut.
        Problem::new(
            ConvLayer { before: [0, 1], after: [0, 2], ..layer([1, 3], [1, 1], [0, 0], 70, 33) },
            2,
            [1, 301],
        ),
        Problem::new(
            ConvLayer { before: [0, 3], after: [0, 3], ..layer([1, 4], [1, 2], [0, 0], 6, 40) },
            1,
            [1, 400],
        ),
        Problem::new(layer([1, 3], [1, 2], [0, 0], 5, 17), 2, [1, 230]),
        Problem::new(ConvLayer { groups: 2, ..layer([1, 3], [1, 1], [0, 0], 5, 17) }, 1, [1, 150]),
        Problem::new(
            ConvLayer { before: [0, 1], after: [0, 1], ..layer([1, 3], [1, 1], [0, 0], 9, 8) },
            1,
            [1, 50],
        ),
        Problem::new(
            ConvLayer { before: [1, 1], after: [1, 1], ..layer([3, 3], [1, 1], [0, 0], 3, 8) },
            2,
            [1, 99],
        ),
        // Last panels of at most half their columns.
        Problem::new(square(5, 16), 1, [9, 17]),
        Problem::new(square(40, 80), 1, [5, 20]),
        Problem::new(layer([1, 1], [1, 1], [0, 0], 36, 44), 1, [6, 5]),
        // Weights that are fetched ahead, over several blocks of lines.
        Problem::new(layer([1, 1], [1, 1], [0, 0], 520, 200), 1, [14, 30]),
        Problem::new(layer([1, 1], [2, 2], [0, 0], 600, 200), 2, [9, 9]),
        // Lines that are too short, and the longest that are.
        Problem::new(layer([1, 1], [2, 3], [0, 0], 40, 70), 3, [5, 7]),
        Problem::new(ConvLayer { groups: 2, ..layer([1, 1], [1, 2], [0, 0], 9, 33) }, 2, [5, 13]),
        // Images beyond the second-level cache.
        Problem::new(layer([1, 1], [1, 1], [0, 0], 64, 72), 1, [72, 72]),
        // More than one block of copied lines, and of weights.
        Problem::new(square(160, 20), 1, [40, 40]),
        Problem::new(square(64, 520), 1, [3, 3]),
        // By Winograd's transformation: odd extents, ends of several sizes, last panels and chunks of all kinds, blocks of tiles.
        Problem::new(square(32, 32), 2, [9, 6]),
        Problem::new(square(35, 44), 3, [1, 7]),
        Problem::new(layer([3, 3], [1, 1], [0, 0], 33, 70), 1, [5, 8]),
        Problem::new(
            ConvLayer { before: [0, 5], after: [3, 2], ..layer([3, 3], [1, 1], [0, 0], 32, 48) },
            2,
            [4, 3],
        ),
        Problem::new(square(130, 36), 2, [40, 17]),
        Problem::new(square(256, 66), 1, [7, 6]),
    ]
}

#[test]
fn results_are_those_of_the_definition_on_each_instruction_set_and_number_of_threads() {
    for problem in problems() {
        let expected = problem.expected();
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let found = problem.run(isa, threads);
                let same = found.iter().zip(&expected).all(|(a, b)| a == b) && found.len() == expected.len();
                assert!(same, "{isa}, {threads} threads: {:?} over {:?}", problem.layer, problem.images);
            }
        }
    }
}

/// Transformed elements are sums of four, transformed weights of nine and outputs of nine products, by which the largest term and so the rounding of its
/// sum may be larger than by the definition.
#[test]
fn winograd_is_the_definition_but_for_rounding() {
    for problem in problems().iter().filter(|problem| problem.layer.is_winograd()) {
        let tolerance = 16.0 * (problem.layer.channels + 16) as f32 * f32::EPSILON / 2.0;
        let (tiles, windows) = (problem.expected_of_tiles(), problem.expected_of_windows());
        let difference = tiles.iter().zip(&windows).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference > 0.0 && difference <= tolerance, "{difference:e}: {:?}", problem.layer);
    }
}

#[test]
fn an_image_gives_the_same_bits_whatever_its_neighbours() {
    let layer = layer([3, 3], [2, 2], [1, 1], 9, 37);
    let several = Problem::new(layer, 3, [11, 12]);
    let mut alone = Problem::new(layer, 1, [11, 12]);
    let (image, result) = (alone.x.len(), alone.addend.len());
    alone.x.copy_from_slice(&several.x[image..2 * image]);
    alone.addend.copy_from_slice(&several.addend[result..2 * result]);
    for isa in Isa::available() {
        assert!(several.run(isa, 2)[result..2 * result] == alone.run(isa, 2)[..], "{isa}");
    }
}

#[test]
fn scratch_for_large_images_serves_small_ones() {
    let square = layer([3, 3], [1, 1], [1, 1], 64, 8);
    let line = layer([1, 3], [1, 1], [0, 1], 64, 8);
    let transformed = layer([3, 3], [1, 1], [1, 1], 64, 64);
    for (layer, lines) in [(square, 200), (line, 1), (transformed, 200)] {
        let kernel = ConvKernel::select(Isa::detect(), layer).unwrap();
        let images = |n: usize| Images { batch: 1, extents: [n.min(lines), n], positions: [n.min(lines), n] };
        let enough = kernel.scratch_bytes(&images(3000));
        assert!((1..3000).all(|n| kernel.scratch_bytes(&images(n)) <= enough));
    }
}

#[test]
fn weights_of_another_number_are_refused() {
    let layer = layer([3, 3], [1, 1], [1, 1], 2, 3);
    assert!(conv_rows(&layer, Isa::Scalar, &[0.0; 53]).is_none());
    assert!(depthwise_order(&layer, &[0.0; 8]).is_none());
    assert_eq!(ConvLayer { before: [0, 0], after: [0, 0], ..layer }.positions(0, 2), None);
}
