use super::*;
use crate::elementwise::Layout;

fn copy<T: Copy>(isa: Isa, shape: &[usize], from: (&[T], usize, &[isize]), to: (&mut [T], usize, &[isize])) {
    let layout = Layout::strided(shape, &[from.2.to_vec(), to.2.to_vec()]).expect("few dimensions");
    let args = CopyArgs {
        element_bytes: size_of::<T>(),
        from: Placed {
            at: from.0[from.1..].as_ptr().cast::<u8>().cast_mut(),
            strides: layout.strides[0],
            inner: layout.inner[0],
        },
        to: Placed {
            at: to.0[to.1..].as_mut_ptr().cast(),
            strides: layout.strides[1],
            inner: layout.inner[1],
        },
        outer: layout.outer,
        cols: layout.cols,
    };
    for tile in 0..args.tiles() {
        // SAFETY: the tests' strides stay inside their slices.
        unsafe { copy_entry(isa).expect("a scalar row exists")(&args, tile) };
    }
}

#[test]
fn transposes_slices_and_broadcasts() {
    for isa in Isa::available() {
        let x: Vec<u32> = (0..7 * 11 * 13).collect();
        let mut y = vec![0u32; x.len()];
        copy(isa, &[13, 7, 11], (&x, 0, &[1, 143, 13]), (&mut y, 0, &[77, 11, 1]));
        for (i, v) in y.iter().enumerate() {
            let (c, a, b) = (i / 77, i / 11 % 7, i % 11);
            assert_eq!(*v as usize, a * 143 + b * 13 + c);
        }
        let heads: Vec<u16> = (0..300 * 6 * 40).map(|i| i as u16).collect();
        let mut swapped = vec![0u16; heads.len()];
        copy(isa, &[6, 300, 40], (&heads, 0, &[40, 240, 1]), (&mut swapped, 0, &[12_000, 40, 1]));
        assert_eq!(swapped[12_000 + 2 * 40 + 7], heads[2 * 240 + 40 + 7]);
        let mut joined = vec![0u64; 4 * 10];
        copy(isa, &[4, 3], (&[1u64; 12], 0, &[3, 1]), (&mut joined, 0, &[10, 1]));
        copy(isa, &[4, 7], (&[2u64], 0, &[0, 0]), (&mut joined, 3, &[10, 1]));
        assert!(joined.chunks(10).all(|row| row[..3] == [1; 3] && row[3..] == [2; 7]));
        let mut reversed = vec![0u8; 5];
        copy(isa, &[5], (&[1u8, 2, 3, 4, 5], 4, &[-1]), (&mut reversed, 0, &[1]));
        assert_eq!(reversed, [5, 4, 3, 2, 1]);
    }
}

#[test]
fn transposes_in_blocks_give_each_element_its_place() {
    // Images to adjacent channels and back: extents of tiles and of vectors, one more, one less; a target with room between its rows.
    let shapes =
        [[2, 3, 4099], [1, 257, 65], [3, 16, 16], [1, 2, 31], [2, 17, 15], [1, 300, 144], [1, 1, 40]];
    for isa in Isa::available() {
        for [batch, rows, columns] in shapes {
            for gap in [0, 5] {
                let x: Vec<u32> = (0..(batch * rows * columns) as u32).map(|i| i ^ 0x7fa0_0000).collect();
                let (size, stride) = (columns * (rows + gap), rows + gap);
                let mut y = vec![7u32; batch * size];
                let from = [(rows * columns) as isize, 1, columns as isize];
                copy(
                    isa,
                    &[batch, columns, rows],
                    (&x, 0, &from),
                    (&mut y, 0, &[size as isize, stride as isize, 1]),
                );
                for (i, v) in y.iter().enumerate() {
                    let (image, column, row) = (i / size, i % size / stride, i % stride);
                    let at = (image * rows + row) * columns + column;
                    assert_eq!(
                        *v,
                        if row < rows { x[at] } else { 7 },
                        "{isa} {batch} {rows} {columns} {gap}"
                    );
                }
            }
        }
    }
}
