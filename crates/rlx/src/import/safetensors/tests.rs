use super::*;
use std::fs;

use crate::weights::BytesWeightLoader;

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

fn parse(bytes: &[u8]) -> Result<Header, LoadError> {
    parse_header(Path::new("w.safetensors"), bytes)
}

fn fault(header: &str, data_bytes: usize) -> LoadError {
    parse(&file_of(header, &vec![0; data_bytes])).unwrap_err()
}

const TWO: &str = r#"{"__metadata__":{"format":"pt"},"z":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
"a":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}"#;

#[test]
fn mapped_tensors_are_borrowed_in_file_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let data: Vec<u8> = (0..14).collect();
    fs::write(&path, file_of(TWO, &data)).unwrap();
    let loader = SafetensorsLoader::open(&path).unwrap();
    assert_eq!(loader.names().collect::<Vec<_>>(), ["z", "a"]);
    assert_eq!(loader.metadata(), [("format".to_owned(), "pt".to_owned())]);
    let view = loader.tensor("a").unwrap().unwrap();
    assert_eq!((view.dtype, view.dims, view.bytes), (DType::BF16, &[1, 3][..], &data[8..]));
    let map = loader.files()[0].bytes().as_ptr_range();
    assert!(map.contains(&view.bytes.as_ptr()));
    assert!(matches!(loader.storage("a").unwrap(), Some(WeightBytes::Mapped(range)) if range.len() == 6));
    assert!(loader.tensor("b").unwrap().is_none() && loader.storage("b").unwrap().is_none());
}

#[test]
fn a_file_in_memory_reads_like_a_mapped_one() {
    let loader = BytesWeightLoader::from_safetensors(file_of(TWO, &[9; 14])).unwrap();
    assert_eq!(loader.names().collect::<Vec<_>>(), ["z", "a"]);
    assert_eq!(loader.tensor_bytes("z").unwrap(), Some(&[9; 8][..]));
    assert!(BytesWeightLoader::from_safetensors(file_of(TWO, &[9; 13])).is_err());
}

#[test]
fn every_dtype_of_the_format_has_its_size() {
    for (spelled, dtype) in DTYPES {
        let bytes = dtype.bytes_for(3).unwrap();
        let header = format!(r#"{{"t":{{"dtype":"{spelled}","shape":[3],"data_offsets":[0,{bytes}]}}}}"#);
        assert_eq!(parse(&file_of(&header, &vec![0; bytes])).unwrap().tensors[0].dtype, *dtype);
    }
}

#[test]
fn scalars_empty_tensors_and_an_empty_header_are_legal() {
    let header = r#"{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "e":{"dtype":"F32","shape":[0,5],"data_offsets":[4,4]}}"#;
    let header = parse(&file_of(header, &[0; 4])).unwrap();
    assert_eq!((header.tensors[0].dims.len(), header.tensors[1].bytes), (0, 0));
    assert!(parse(&file_of("{}  ", &[])).unwrap().tensors.is_empty());
}

#[test]
fn duplicate_name_is_named() {
    let one = r#""w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let error = fault(&format!("{{{one},{one}}}"), 1);
    assert!(matches!(&error, LoadError::Duplicate { tensor, .. } if tensor == "w"), "{error}");
}

#[test]
fn overlap_names_both_tensors_and_the_offset() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
        "b":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}"#;
    match fault(header, 7) {
        LoadError::Overlap { tensor, other, offset, other_end, .. } => {
            assert_eq!((tensor.as_str(), other.as_str()), ("b", "a"));
            assert_eq!((offset, other_end), (8 + header.len() as u64 + 3, 8 + header.len() as u64 + 4));
        }
        other => panic!("{other}"),
    }
    let same = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
        "b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    assert!(matches!(fault(same, 4), LoadError::Overlap { .. }));
}

#[test]
fn out_of_range_names_tensor_end_and_file_size() {
    let header = r#"{"w":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#;
    let error = fault(header, 5);
    let (end, size) = (8 + header.len() as u64 + 9, 8 + header.len() as u64 + 5);
    assert!(
        matches!(&error, LoadError::OutOfFile { tensor, end: e, file_bytes, .. }
            if tensor == "w" && *e == end && *file_bytes == size),
        "{error}"
    );
}

#[test]
fn wrong_length_says_expected_and_found() {
    let error = fault(r#"{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}}"#, 12);
    assert!(matches!(error, LoadError::Length { expected_bytes: 16, found_bytes: 12, .. }), "{error}");
    let error = fault(r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[3,1]}}"#, 12);
    assert!(matches!(error, LoadError::Entry { .. }), "{error}");
}

#[test]
fn sizes_of_2_to_the_63_do_not_wrap() {
    let huge = 1u64 << 63;
    for header in [
        format!(r#"{{"w":{{"dtype":"F32","shape":[{huge}],"data_offsets":[0,0]}}}}"#),
        format!(r#"{{"w":{{"dtype":"F32","shape":[{huge},{huge}],"data_offsets":[0,{huge}]}}}}"#),
    ] {
        assert!(matches!(fault(&header, 0), LoadError::Size { .. }), "{header}");
    }
    let claimed = format!(r#"{{"w":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}}}}"#);
    assert!(matches!(fault(&claimed, 4), LoadError::OutOfFile { .. }));
    let max = u64::MAX;
    let end = format!(r#"{{"w":{{"dtype":"U8","shape":[1],"data_offsets":[{},{max}]}}}}"#, max - 1);
    assert!(matches!(fault(&end, 4), LoadError::OutOfFile { .. }));
    let beyond = r#"{"w":{"dtype":"U8","shape":[36893488147419103232],"data_offsets":[0,1]}}"#;
    assert!(matches!(fault(beyond, 1), LoadError::Entry { .. }));
}

#[test]
fn header_bombs_are_refused_before_anything_is_allocated() {
    for claimed in [u64::MAX, 1 << 63, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES, 1000] {
        let mut file = claimed.to_le_bytes().to_vec();
        file.extend_from_slice(b"{}");
        assert!(matches!(parse(&file), Err(LoadError::Header { offset: 0, .. })), "{claimed}");
    }
    let nested = format!("{{\"w\":{}", "[".repeat(200_000));
    assert!(matches!(fault(&nested, 0), LoadError::Header { .. }));
}

#[test]
fn unknown_dtype_is_named_with_its_tensor() {
    let error = fault(r#"{"w":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}"#, 4);
    assert!(
        matches!(&error, LoadError::UnknownDType { tensor, found, .. } if tensor == "w" && found == "F31"),
        "{error}"
    );
    assert!(error.to_string().contains("BF16"));
}

#[test]
fn invalid_utf8_in_the_header_names_its_byte() {
    let mut file = file_of(r#"{"w?":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#, &[0]);
    file[11] = 0xff;
    match parse(&file).unwrap_err() {
        LoadError::Header { offset: 11, found, .. } => assert_eq!(found, "invalid UTF-8"),
        other => panic!("{other}"),
    }
}

#[test]
fn gaps_and_trailing_bytes_are_refused_as_the_format_rules() {
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}"#;
    assert!(matches!(fault(header, 4), LoadError::Gap { bytes: 2, .. }));
    let trailing = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    assert!(matches!(fault(trailing, 6), LoadError::Gap { bytes: 5, .. }));
    let leading = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    assert!(matches!(fault(leading, 2), LoadError::Gap { bytes: 1, .. }));
}

#[test]
fn malformed_entries_are_named() {
    for entry in [
        "3",
        "[]",
        "null",
        "{}",
        r#"{"dtype":"U8","shape":[1]}"#,
        r#"{"dtype":"U8","data_offsets":[0,1]}"#,
        r#"{"shape":[1],"data_offsets":[0,1]}"#,
        r#"{"dtype":7,"shape":[1],"data_offsets":[0,1]}"#,
        r#"{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}"#,
        r#"{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}"#,
        r#"{"dtype":"U8","shape":1,"data_offsets":[0,1]}"#,
        r#"{"dtype":"U8","shape":[1],"data_offsets":[0]}"#,
        r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}"#,
        r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1],"scale":2}"#,
    ] {
        let error = fault(&format!(r#"{{"w":{entry}}}"#), 1);
        assert!(matches!(&error, LoadError::Entry { tensor, .. } if tensor == "w"), "{entry}: {error}");
    }
    assert!(matches!(fault(r#"{"__metadata__":{"a":1}}"#, 0), LoadError::Entry { .. }));
    for broken in ["", "[]", " {}", "{", "{}x", r#"{"w":}"#, "\u{feff}{}"] {
        assert!(matches!(fault(broken, 0), LoadError::Header { .. }), "{broken}");
    }
}

#[test]
fn a_file_truncated_at_any_length_is_an_error() {
    let whole = file_of(TWO, &[1; 14]);
    parse(&whole).unwrap();
    for length in 0..whole.len() {
        assert!(parse(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn a_flipped_header_byte_never_yields_tensors_outside_the_file() {
    let whole = file_of(TWO, &[1; 14]);
    for at in 0..8 + TWO.len() {
        for flip in [0x01, 0x10, 0x80, 0xff] {
            let mut file = whole.clone();
            file[at] ^= flip;
            if let Ok(header) = parse(&file) {
                for tensor in header.tensors {
                    assert!(tensor.offset + tensor.bytes <= file.len());
                    assert_eq!(rlx_tensor::byte_count(&tensor.dims, tensor.dtype), Some(tensor.bytes));
                }
            }
        }
    }
}

#[test]
fn an_unaligned_tensor_loads_and_only_its_typed_borrow_fails() {
    let header = r#"{"pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
"w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#;
    let padded = format!("{header}{}", " ".repeat(8 - header.len() % 8));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("u.safetensors");
    fs::write(&path, file_of(&padded, &[0, 0, 0, 128, 63])).unwrap();
    let loader = SafetensorsLoader::open(&path).unwrap();
    let view = loader.tensor("w").unwrap().unwrap();
    assert_eq!(view.bytes, 1.0f32.to_le_bytes());
    assert!(matches!(view.as_slice::<f32>(), Err(LoadError::Unaligned { .. })));
}

#[test]
fn a_file_that_shrinks_is_an_error_at_the_next_look_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.safetensors");
    fs::write(&path, file_of(TWO, &[1; 14])).unwrap();
    let loader = SafetensorsLoader::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(20).unwrap();
    assert!(matches!(loader.tensor("a"), Err(LoadError::Map(MapError::Shrank { .. }))));
    assert!(loader.still_valid().is_err());
}

struct Sharded {
    folder: tempfile::TempDir,
}

impl Sharded {
    fn new(index: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shard = |name: &str| format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        fs::write(folder.path().join("s1.safetensors"), file_of(&shard("a"), &[1])).unwrap();
        fs::write(folder.path().join("s2.safetensors"), file_of(&shard("b"), &[2])).unwrap();
        fs::write(folder.path().join(INDEX_FILE), index).unwrap();
        Sharded { folder }
    }

    fn open(&self) -> Result<SafetensorsLoader, ImportError> {
        SafetensorsLoader::open(self.folder.path())
    }
}

const INDEX: &str =
    r#"{"metadata":{"total_size":2},"weight_map":{"b":"s2.safetensors","a":"s1.safetensors"}}"#;

#[test]
fn shards_of_an_index_are_one_loader() {
    let loader = Sharded::new(INDEX).open().unwrap();
    assert_eq!(loader.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(loader.tensor_bytes("b").unwrap(), Some(&[2u8][..]));
    assert_eq!(loader.files().len(), 2);
}

#[test]
fn an_absent_shard_is_named_with_a_tensor_it_holds() {
    let sharded = Sharded::new(INDEX);
    fs::remove_file(sharded.folder.path().join("s2.safetensors")).unwrap();
    match sharded.open() {
        Err(ImportError::Load(LoadError::MissingShard { shard, tensor, .. })) => {
            assert_eq!((shard.as_str(), tensor.as_str()), ("s2.safetensors", "b"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tensor_the_shard_does_not_hold_is_named() {
    let index = r#"{"weight_map":{"b":"s2.safetensors","a":"s1.safetensors","c":"s1.safetensors"}}"#;
    let error = Sharded::new(index).open().unwrap_err();
    assert!(
        matches!(&error, ImportError::Load(LoadError::NotInShard { tensor, .. }) if tensor == "c"),
        "{error}"
    );
    let swapped = r#"{"weight_map":{"a":"s2.safetensors","b":"s1.safetensors"}}"#;
    assert!(Sharded::new(swapped).open().is_err());
}

#[test]
fn a_tensor_the_index_does_not_list_is_reported_and_not_served() {
    let index = r#"{"weight_map":{"a":"s1.safetensors"}}"#;
    let sharded = Sharded::new(index);
    let both = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    fs::write(sharded.folder.path().join("s1.safetensors"), file_of(both, &[1, 2])).unwrap();
    let loader = sharded.open().unwrap();
    assert_eq!(loader.unlisted(), ["x"]);
    assert!(loader.tensor("x").unwrap().is_none());
}

#[test]
fn an_index_that_is_broken_or_points_outside_is_refused() {
    for index in [
        "{}",
        "[]",
        "{",
        r#"{"weight_map":[]}"#,
        r#"{"weight_map":{"a":1}}"#,
        r#"{"weight_map":{"a":"../s1.safetensors"}}"#,
        r#"{"weight_map":{"a":"/etc/x.safetensors"}}"#,
        r#"{"weight_map":{"a":"s1.bin"}}"#,
        r#"{"weight_map":{"a":"s1.safetensors","a":"s1.safetensors"}}"#,
    ] {
        assert!(Sharded::new(index).open().is_err(), "{index}");
    }
}

#[test]
fn pickled_checkpoints_are_refused_by_name_and_in_a_folder() {
    for name in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.pth", "m.ckpt"] {
        let error = SafetensorsLoader::open(Path::new("x").join(name)).unwrap_err();
        assert!(matches!(&error, ImportError::Load(LoadError::Pickle { .. })), "{name}: {error}");
        assert!(error.to_string().contains("safe_serialization=True"));
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(SafetensorsLoader::open(folder.path()), Err(ImportError::MissingFile { .. })));
    fs::write(folder.path().join("pytorch_model.bin"), b"PK").unwrap();
    assert!(matches!(
        SafetensorsLoader::open(folder.path()),
        Err(ImportError::Load(LoadError::Pickle { .. }))
    ));
}
