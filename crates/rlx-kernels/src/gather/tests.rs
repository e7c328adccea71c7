use super::*;
use crate::isa::half::{bf16_to_f32, f16_to_f32};

#[test]
fn rows_are_looked_up_widened_and_scaled() {
    let cols = 19;
    let bits: Vec<u16> = (0..10 * cols).map(|i| (i * 97 % 0x7b00) as u16).collect();
    let floats: Vec<f32> = (0..10 * cols).map(|i| i as f32).collect();
    let ids = [3i64, 9, 0, 3];
    for isa in Isa::available() {
        for table_type in [TableType::F32, TableType::F16, TableType::Bf16] {
            let mut out = vec![1.0f32; 4 * 21];
            let args = EmbedArgs {
                table: if table_type == TableType::F32 {
                    floats.as_ptr().cast()
                } else {
                    bits.as_ptr().cast()
                },
                table_type,
                table_stride: cols,
                cols,
                ids: Ids::I64(ids.as_ptr()),
                rows: 4,
                scale: 0.5,
                accumulate: true,
                out: out.as_mut_ptr(),
                out_stride: 21,
                rows_per_tile: 3,
            };
            for tile in 0..args.tiles() {
                // SAFETY: the ids are below 10 and the vectors hold the rows.
                unsafe { embed_entry(isa).expect("a scalar row exists")(&args, tile) };
            }
            for (r, id) in ids.iter().enumerate() {
                for c in 0..cols {
                    let at = *id as usize * cols + c;
                    let x = match table_type {
                        TableType::F32 => floats[at],
                        TableType::F16 => f16_to_f32(bits[at]),
                        TableType::Bf16 => bf16_to_f32(bits[at]),
                    };
                    assert_eq!(out[r * 21 + c], 1.0 + 0.5 * x);
                }
                assert_eq!(out[r * 21 + cols], 1.0);
            }
        }
    }
}

#[test]
fn a_bad_id_is_reported_with_its_place() {
    let ids = [0i32, 4, 5, -1];
    // SAFETY: four ids are readable.
    unsafe {
        assert_eq!(check_ids(Ids::I32(ids.as_ptr()), 4, 5), Err((2, 5)));
        assert_eq!(check_ids(Ids::I32(ids.as_ptr()), 2, 5), Ok(()));
        assert_eq!(check_ids(Ids::I32(ids[3..].as_ptr()), 1, 5), Err((0, -1)));
    }
}

#[test]
fn scatter_undoes_gather() {
    let from: Vec<u8> = (0..50).collect();
    let ids = [4i32, 0, 3, 1, 2];
    let (mut mixed, mut back) = (vec![0u8; 50], vec![0u8; 50]);
    let mut args = RowArgs {
        from: from.as_ptr(),
        from_stride: 10,
        to: mixed.as_mut_ptr(),
        to_stride: 10,
        row_bytes: 10,
        ids: Ids::I32(ids.as_ptr()),
        rows: 5,
        rows_per_tile: 2,
    };
    for isa in Isa::available() {
        args = RowArgs { from: from.as_ptr(), to: mixed.as_mut_ptr(), ..args };
        // SAFETY: the ids are below 5 and the vectors hold 5 rows.
        unsafe {
            for tile in 0..args.tiles() {
                gather_entry(isa).expect("a scalar row exists")(&args, tile);
            }
            assert_eq!(mixed[..10], from[40..]);
            args = RowArgs { from: mixed.as_ptr(), to: back.as_mut_ptr(), ..args };
            scatter_entry(isa).expect("a scalar row exists")(&args, 0);
        }
        assert_eq!(back, from);
    }
}
