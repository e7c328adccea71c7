#![expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests patch bytes at places they know"
)]

use super::*;
use crate::weights::BytesWeightLoader;

fn entry(name: &str, dims: &[usize], dtype: DType) -> TensorEntry {
    TensorEntry { name: name.to_owned(), dims: dims.to_vec(), dtype }
}

fn sample_metadata() -> Metadata {
    let mut metadata = Metadata::new(Path::new("m"));
    let strings =
        |texts: &[&str]| Value::Array(Array::String(texts.iter().map(|t| (*t).to_owned()).collect()));
    for (key, value) in [
        ("general.architecture", Value::String("llama".into())),
        ("a.u8", Value::U8(200)),
        ("a.i16", Value::I16(-3)),
        ("a.u64", Value::U64(1 << 40)),
        ("a.f32", Value::F32(1.5)),
        ("a.f64", Value::F64(-2.5)),
        ("a.bool", Value::Bool(true)),
        ("a.texts", strings(&["x", "", "日本"])),
        ("a.floats", Value::Array(Array::F32(vec![0.0, -1.0]))),
        ("a.bools", Value::Array(Array::Bool(vec![true, false]))),
        ("a.none", Value::Array(Array::I32(vec![]))),
    ] {
        assert!(metadata.insert(key, value));
    }
    metadata
}

/// A valid file: two tensors, the second quantised.
fn sample() -> Vec<u8> {
    let tensors = [entry("w", &[3, 2], DType::F32), entry("q", &[2, 32], DType::Q8_0)];
    let mut file = encode_header(&sample_metadata(), &tensors, 32).unwrap();
    file.extend((0..24).map(|i| i as u8));
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend([7; 68]);
    file
}

fn parse(bytes: &[u8]) -> Result<Header, LoadError> {
    parse_header(Path::new("m.gguf"), bytes)
}

#[test]
fn what_is_written_is_read_back() {
    let file = sample();
    let header = parse(&file).unwrap();
    assert_eq!((header.version, header.alignment, header.data_start % 32), (3, 32, 0));
    assert_eq!(header.metadata.entries(), sample_metadata().entries());
    let names: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.dims.clone(), t.dtype)).collect();
    assert_eq!(names, [("w", vec![3, 2], DType::F32), ("q", vec![2, 32], DType::Q8_0)]);
    let loader = BytesWeightLoader::from_gguf(file.clone()).unwrap();
    assert_eq!(loader.tensor("q").unwrap().unwrap().bytes, [7; 68]);
    let mut second = file.clone();
    second[4] = 2;
    assert_eq!(parse(&second).unwrap().version, 2);
}

#[test]
fn a_mapped_file_gives_borrowed_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    std::fs::write(&path, sample()).unwrap();
    let loader = GgufLoader::open(&path).unwrap();
    assert_eq!(loader.names().collect::<Vec<_>>(), ["w", "q"]);
    let view = loader.tensor("w").unwrap().unwrap();
    let start = loader.files()[0].bytes().as_ptr() as usize;
    let at = view.bytes.as_ptr() as usize - start;
    assert!(at < loader.files()[0].len());
    assert!(matches!(loader.storage("w").unwrap(), Some(WeightBytes::Mapped(_))));
    assert!(loader.tensor("absent").unwrap().is_none());
    loader.still_valid().unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
    assert!(loader.tensor("w").is_err());
}

#[test]
fn typed_reads_name_key_and_kind() {
    let metadata = parse(&sample()).unwrap().metadata;
    assert_eq!(metadata.u64("a.u8").unwrap(), Some(200));
    assert_eq!(metadata.f64("a.f32").unwrap(), Some(1.5));
    assert_eq!(metadata.bool("a.bool").unwrap(), Some(true));
    assert_eq!(metadata.strings("a.texts").unwrap().unwrap()[2], "日本");
    assert_eq!(metadata.f32s("a.floats").unwrap(), Some(&[0.0, -1.0][..]));
    assert_eq!(metadata.u64("absent").unwrap(), None);
    let error = metadata.u64("a.i16").unwrap_err().to_string();
    assert!(error.contains("m.gguf") && error.contains("a.i16") && error.contains("i16 -3"), "{error}");
    let error = metadata.required("absent", "a whole number", Metadata::u64).unwrap_err().to_string();
    assert!(error.contains("`absent` is missing"), "{error}");
}

/// A file of raw parts: counts as given, then `rest`.
fn raw(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest);
    file
}

fn text(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend(bytes);
    out
}

fn parts(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn tensor_entry(name: &[u8], dims: &[u64], code: u32, offset: u64) -> Vec<u8> {
    let mut out = text(name);
    out.extend((dims.len() as u32).to_le_bytes());
    dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
    out.extend(code.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

fn padded(mut file: Vec<u8>, data: usize) -> Vec<u8> {
    file.resize(file.len().next_multiple_of(32) + data, 0);
    file
}

/// One tensor of `data` bytes.
fn with_tensor(dims: &[u64], code: u32, offset: u64, data: usize) -> Vec<u8> {
    padded(raw(1, 0, &tensor_entry(b"w", dims, code, offset)), data)
}

fn with_alignment(code: u32, value: &[u8]) -> Vec<u8> {
    padded(raw(0, 1, &parts(&[&text(b"general.alignment"), &code.to_le_bytes(), value])), 64)
}

/// Every class of broken file: what it is, its bytes, a piece of the message.
fn broken() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let u32s = u32::to_le_bytes;
    let u64s = u64::to_le_bytes;
    let key = text(b"k");
    let pair = parts(&[&tensor_entry(b"w", &[8], 0, 0), &tensor_entry(b"w", &[8], 0, 32)]);
    let overlap = parts(&[&tensor_entry(b"a", &[16], 0, 0), &tensor_entry(b"b", &[8], 0, 32)]);
    vec![
        ("empty", vec![], "4 bytes of magic"),
        ("other magic", b"GGML\x03\0\0\0".to_vec(), "expected `GGUF`"),
        ("version 1", [&b"GGUF\x01\0\0\0"[..], &[0; 40]].concat(), "version 2 or 3, found 1"),
        ("version 4", [&b"GGUF\x04\0\0\0"[..], &[0; 40]].concat(), "found 4"),
        ("big-endian", [&b"GGUF\0\0\0\x03"[..], &[0; 40]].concat(), "big-endian"),
        ("cut in the counts", b"GGUF\x03\0\0\0\x01".to_vec(), "may be truncated"),
        ("tensor count bomb", raw(u64::MAX, 0, &[0; 64]), "tensor count of at most"),
        ("metadata count bomb", raw(0, 1 << 60, &[0; 64]), "metadata count of at most"),
        ("key length bomb", raw(0, 1, &parts(&[&u64s(u64::MAX), &[0; 32]])), "length of a key"),
        ("key too long", raw(0, 1, &text(&[b'k'; 70_000])), "at most 65535"),
        ("key not UTF-8", raw(0, 1, &parts(&[&text(b"\xff\xfe"), &u32s(4), &u32s(1)])), "UTF-8"),
        ("key twice", raw(0, 2, &parts(&[&key, &u32s(4), &u32s(1), &key, &u32s(4), &u32s(1)])), "`k` again"),
        ("value type", raw(0, 1, &parts(&[&key, &u32s(13), &u32s(1)])), "value type"),
        ("string bomb", raw(0, 1, &parts(&[&key, &u32s(8), &u64s(1 << 62)])), "length of a string"),
        ("truth of 2", raw(0, 1, &parts(&[&key, &u32s(7), &[2]])), "0 or 1"),
        (
            "array bomb",
            raw(0, 1, &parts(&[&key, &u32s(9), &u32s(6), &u64s(1 << 61)])),
            "array length of at most",
        ),
        ("array wrap", raw(0, 1, &parts(&[&key, &u32s(9), &u32s(10), &u64s(1 << 61)])), "array length"),
        (
            "string array bomb",
            raw(0, 1, &parts(&[&key, &u32s(9), &u32s(8), &u64s(9), &[0; 64]])),
            "array length",
        ),
        (
            "nested array",
            raw(0, 1, &parts(&[&key, &u32s(9), &u32s(9), &u64s(1), &[0; 32]])),
            "array of arrays",
        ),
        ("array type", raw(0, 1, &parts(&[&key, &u32s(9), &u32s(99), &u64s(1), &[0; 32]])), "value type"),
        ("alignment 0", with_alignment(4, &u32s(0)), "power of two"),
        ("alignment 3", with_alignment(4, &u32s(3)), "power of two"),
        ("alignment 2^31", with_alignment(4, &u32s(1 << 31)), "power of two"),
        ("alignment of text", with_alignment(8, &text(b"32")), "a string"),
        ("five dims", with_tensor(&[1, 1, 1, 1, 1], 0, 0, 64), "at most 4 dims"),
        (
            "dims bomb",
            padded(raw(1, 0, &parts(&[&text(b"w"), &u32s(u32::MAX), &[0; 64]])), 0),
            "at most 4 dims",
        ),
        ("negative dim", with_tensor(&[1 << 63], 0, 0, 64), "below 2^63"),
        ("size wraps", with_tensor(&[1 << 40, 1 << 40], 0, 0, 64), "no valid size"),
        ("bytes wrap", with_tensor(&[1 << 62], 0, 0, 64), "no valid size"),
        ("withdrawn type", with_tensor(&[32], 4, 0, 64), "unknown dtype `4`"),
        ("activation type", with_tensor(&[32], 9, 0, 64), "unknown dtype `9`"),
        ("half a block", with_tensor(&[16, 2], 2, 0, 64), "whole blocks of 32"),
        ("half a superblock", with_tensor(&[128, 2], 12, 0, 256), "whole blocks of 256"),
        ("misaligned", with_tensor(&[8], 0, 8, 64), "multiple of 32"),
        ("out of the file", with_tensor(&[64], 0, 0, 64), "truncated"),
        ("offset wraps", with_tensor(&[8], 0, u64::MAX - 31, 64), "truncated"),
        ("offset far out", with_tensor(&[8], 0, 1 << 40, 64), "truncated"),
        ("name twice", padded(raw(2, 0, &pair), 128), "there twice"),
        ("overlap", padded(raw(2, 0, &overlap), 128), "overlaps `a`"),
        ("name bomb", padded(raw(1, 0, &text(&[b'n'; 2000])), 64), "at most 1024"),
        ("name not UTF-8", padded(raw(1, 0, &tensor_entry(b"\xc3", &[8], 0, 0)), 64), "UTF-8"),
        ("cut in an entry", raw(1, 0, &tensor_entry(b"w", &[8], 0, 0)[..24]), "truncated"),
    ]
}

#[test]
fn broken_files_are_errors_that_say_what_and_where() {
    let cases = broken();
    for (what, bytes, message) in &cases {
        let error = parse(bytes).expect_err(what).to_string();
        assert!(error.starts_with("m.gguf: ") && error.contains(message), "{what}: {error}");
        assert!(BytesWeightLoader::from_gguf(bytes.clone()).is_err(), "{what}");
    }
    assert!(cases.len() >= 40);
}

#[test]
fn a_file_cut_anywhere_in_its_header_is_an_error_and_any_bit_flip_is_no_panic() {
    let file = sample();
    let header = parse(&file).unwrap();
    for end in 0..header.data_start {
        assert!(parse(&file[..end]).is_err(), "cut at {end}");
    }
    let mut accepted = 0;
    for at in 0..header.data_start {
        for bit in 0..8 {
            let mut flipped = file.clone();
            flipped[at] ^= 1 << bit;
            if let Ok(header) = parse(&flipped) {
                accepted += 1;
                for tensor in header.tensors {
                    assert!(tensor.offset + tensor.bytes <= flipped.len());
                }
            }
        }
    }
    assert!(accepted > 0);
}

#[test]
fn padding_between_tensors_is_allowed() {
    let entries = parts(&[&tensor_entry(b"a", &[8], 0, 64), &tensor_entry(b"b", &[0], 0, 64)]);
    let header = parse(&padded(raw(2, 0, &entries), 256)).unwrap();
    assert_eq!(header.tensors[1].bytes, 0);
}

fn split(folder: &Path, number: u64, count: u64, total: u64, tensor: &str) -> std::path::PathBuf {
    let mut metadata = Metadata::new(folder);
    metadata.insert("split.no", Value::U16(number as u16));
    metadata.insert("split.count", Value::U16(count as u16));
    metadata.insert("split.tensors.count", Value::I32(total as i32));
    let mut file = encode_header(&metadata, &[entry(tensor, &[8], DType::F32)], 32).unwrap();
    file.extend([number as u8; 32]);
    let path = folder.join(split_name("m", number as usize, count as usize));
    std::fs::write(&path, file).unwrap();
    path
}

#[test]
fn a_split_model_opens_by_any_part_and_says_which_is_missing_or_foreign() {
    let folder = tempfile::tempdir().unwrap();
    let first = split(folder.path(), 0, 2, 2, "a");
    let missing = GgufLoader::open(&first).unwrap_err().to_string();
    assert!(missing.contains("m-00002-of-00002.gguf") && missing.contains("part 2 of 2"), "{missing}");
    let second = split(folder.path(), 1, 2, 2, "b");
    for path in [&first, &second] {
        let loader = GgufLoader::open(path).unwrap();
        assert_eq!(loader.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(loader.tensor("b").unwrap().unwrap().bytes, [1; 32]);
        assert_eq!(loader.files().len(), 2);
    }
    let renamed = folder.path().join("other.gguf");
    std::fs::copy(&first, &renamed).unwrap();
    assert!(GgufLoader::open(&renamed).unwrap_err().to_string().contains("of-00002.gguf"));
    split(folder.path(), 1, 2, 2, "a");
    assert!(GgufLoader::open(&first).unwrap_err().to_string().contains("there twice"));
    std::fs::copy(&first, &second).unwrap();
    assert!(GgufLoader::open(&first).unwrap_err().to_string().contains("split.no"));
    split(folder.path(), 0, 2, 3, "a");
    split(folder.path(), 1, 2, 3, "b");
    assert!(GgufLoader::open(&first).unwrap_err().to_string().contains("3 tensors in all parts"));
}
