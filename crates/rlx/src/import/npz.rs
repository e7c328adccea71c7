//! `.npz`: a zip archive of `.npy` arrays, stored without compression so that they can be borrowed.
//!
//! Zip: PKWARE APPNOTE 6.3, with zip64. Npy: NumPy enhancement proposal 1. Zip allows gaps between entries; overlaps
//! are refused. The checksum of an entry is not verified: that would read every byte.

use std::path::Path;
use std::sync::Arc;

use rlx_tensor::DType;
use rlx_tensor::storage::mapped::{MappedFile, MappedRange};

use crate::weights::{LoadError, NameTable, TensorView, WeightBytes, WeightLoader, check_length};

const END_BYTES: usize = 22;
const END64_LOCATOR_BYTES: usize = 20;
const CENTRAL_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;
/// Longest array header that is read.
const MAX_ARRAY_HEADER_BYTES: usize = 64 << 10;

/// One array of an archive, checked against the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NpzArray {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) dims: Vec<usize>,
    /// First byte, from the start of the file.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// Arrays of a mapped `.npz` file.
#[derive(Debug)]
pub struct NpzLoader {
    arrays: NameTable<(DType, Vec<usize>, MappedRange)>,
}

impl NpzLoader {
    /// Opens an archive; names are the entries' without `.npy`.
    ///
    /// # Errors
    /// [`LoadError`] for a broken archive, compressed entries (written by `savez_compressed`), arrays of Fortran
    /// order, big-endian or structured types.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        let path = path.as_ref();
        let file: Arc<MappedFile> = MappedFile::open(path)?;
        let mut arrays = NameTable::new();
        for array in parse_npz(path, file.bytes())? {
            let range = file.range(array.offset, array.bytes)?;
            if !arrays.insert(&array.name, (array.dtype, array.dims, range)) {
                return Err(LoadError::Duplicate { file: path.to_path_buf(), tensor: array.name });
            }
        }
        Ok(NpzLoader { arrays })
    }
}

impl WeightLoader for NpzLoader {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError> {
        let Some((name, (dtype, dims, range))) = self.arrays.find(name) else { return Ok(None) };
        range.still_valid()?;
        Ok(Some(TensorView { name, dtype: *dtype, dims, bytes: range.bytes() }))
    }

    fn storage(&self, name: &str) -> Result<Option<WeightBytes>, LoadError> {
        Ok(self.arrays.find(name).map(|(_, (_, _, range))| WeightBytes::Mapped(range.clone())))
    }

    fn names(&self) -> Box<dyn ExactSizeIterator<Item = &str> + '_> {
        Box::new(self.arrays.names())
    }
}

/// A place in a file, for reading little-endian numbers and naming faults.
#[derive(Clone, Copy)]
struct At<'a> {
    file: &'a Path,
    bytes: &'a [u8],
}

impl<'a> At<'a> {
    fn fault(&self, offset: usize, expected: &str, found: impl Into<String>) -> LoadError {
        LoadError::Header {
            file: self.file.to_path_buf(),
            offset: offset as u64,
            expected: expected.to_owned(),
            found: found.into(),
        }
    }

    fn slice(&self, offset: usize, len: usize, what: &str) -> Result<&'a [u8], LoadError> {
        let end = offset.checked_add(len);
        end.and_then(|end| self.bytes.get(offset..end)).ok_or_else(|| {
            self.fault(offset, what, format!("the end of the file at byte {}", self.bytes.len()))
        })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    little_endian(&bytes[at..at + 2])
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    little_endian(&bytes[at..at + 4])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    little_endian(&bytes[at..at + 8])
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn place(value: u64) -> usize {
    // What does not fit a usize is beyond the end of any file that could be mapped.
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Lists the arrays of a whole archive in memory.
pub(crate) fn parse_npz(file: &Path, bytes: &[u8]) -> Result<Vec<NpzArray>, LoadError> {
    let at = At { file, bytes };
    let (count, mut offset, directory_end) = directory(at)?;
    let mut arrays = Vec::new();
    let mut spans: Vec<(usize, usize, String)> = Vec::new();
    for _ in 0..count {
        let (entry, next) = central_entry(at, offset, directory_end)?;
        offset = next;
        let Some(name) = entry.name.strip_suffix(".npy") else {
            return Err(at.fault(offset, "only .npy entries", format!("`{}`", entry.name)));
        };
        spans.push((entry.local, entry.data + entry.len, name.to_owned()));
        arrays.push(array(at, name, entry.data, entry.len)?);
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(LoadError::Overlap {
                file: file.to_path_buf(),
                tensor: pair[1].2.clone(),
                offset: pair[1].0 as u64,
                other: pair[0].2.clone(),
                other_end: pair[0].1 as u64,
            });
        }
    }
    Ok(arrays)
}

/// Count of entries, and where the central directory starts and ends.
fn directory(at: At) -> Result<(u64, usize, usize), LoadError> {
    let tail = at.bytes.len().saturating_sub(END_BYTES + usize::from(u16::MAX));
    let end = at.bytes[tail..]
        .windows(END_BYTES)
        .rposition(|window| window.starts_with(b"PK\x05\x06"))
        .map(|position| tail + position)
        .ok_or_else(|| at.fault(0, "a zip archive", "no end record; the file may be truncated"))?;
    let record = at.slice(end, END_BYTES, "the end record")?;
    let (mut count, mut size, mut start) = (u16_at(record, 10), u32_at(record, 12), u32_at(record, 16));
    let mut limit = end;
    if let Some(locator) = end.checked_sub(END64_LOCATOR_BYTES)
        && at.bytes[locator..].starts_with(b"PK\x06\x07")
    {
        let end64 = place(u64_at(at.bytes, locator + 8));
        let record = at.slice(end64, 56, "the zip64 end record")?;
        if !record.starts_with(b"PK\x06\x06") {
            return Err(at.fault(end64, "the zip64 end record", format!("{:02x?}", &record[..4])));
        }
        (count, size, start) = (u64_at(record, 32), u64_at(record, 40), u64_at(record, 48));
        limit = end64;
    }
    let stop = start.checked_add(size).map(place);
    match stop {
        Some(stop) if stop <= limit => Ok((count, place(start), stop)),
        _ => Err(at.fault(end, "a directory before the end record", format!("{size} bytes at byte {start}"))),
    }
}

struct Entry {
    name: String,
    local: usize,
    data: usize,
    len: usize,
}

fn central_entry(at: At, offset: usize, directory_end: usize) -> Result<(Entry, usize), LoadError> {
    let header = at.slice(offset, CENTRAL_BYTES, "a directory entry")?;
    if !header.starts_with(b"PK\x01\x02") || offset + CENTRAL_BYTES > directory_end {
        return Err(at.fault(offset, "a directory entry", format!("{:02x?}", &header[..4])));
    }
    let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
    let (name_len, extra_len) = (place(u16_at(header, 28)), place(u16_at(header, 30)));
    let comment_len = place(u16_at(header, 32));
    let name = at.slice(offset + CENTRAL_BYTES, name_len, "the entry's name")?;
    let name = std::str::from_utf8(name)
        .map_err(|error| {
            at.fault(offset + CENTRAL_BYTES + error.valid_up_to(), "a name in UTF-8", "invalid UTF-8")
        })?
        .to_owned();
    if flags & 1 != 0 || method != 0 {
        let found = if flags & 1 != 0 { "encrypted".to_owned() } else { format!("compression {method}") };
        let expected = "stored bytes, as numpy.savez writes (not savez_compressed)".to_owned();
        return Err(LoadError::Entry { file: at.file.to_path_buf(), tensor: name, expected, found });
    }
    let extra = at.slice(offset + CENTRAL_BYTES + name_len, extra_len, "the entry's extra field")?;
    let sizes = [u32_at(header, 24), u32_at(header, 20), u32_at(header, 42)];
    let [len, stored, local] = widened(sizes, extra).ok_or_else(|| {
        at.fault(offset + CENTRAL_BYTES + name_len, "zip64 sizes", "a field that is too short")
    })?;
    if len != stored {
        return Err(at.fault(offset, "one size for stored bytes", format!("{stored} and {len}")));
    }
    let local = place(local);
    let local_header = at.slice(local, LOCAL_BYTES, "a local header")?;
    if !local_header.starts_with(b"PK\x03\x04") {
        return Err(at.fault(local, "a local header", format!("{:02x?}", &local_header[..4])));
    }
    let data = local + LOCAL_BYTES + place(u16_at(local_header, 26)) + place(u16_at(local_header, 28));
    let len = place(len);
    at.slice(data, len, "the entry's bytes")?;
    let next = offset + CENTRAL_BYTES + name_len + extra_len + comment_len;
    Ok((Entry { name, local, data, len }, next))
}

/// Size, stored size and offset, with those that read 0xffffffff taken from the zip64 extra field.
fn widened(mut values: [u64; 3], mut extra: &[u8]) -> Option<[u64; 3]> {
    if values.iter().all(|&value| value != u64::from(u32::MAX)) {
        return Some(values);
    }
    while extra.len() >= 4 {
        let len = place(u16_at(extra, 2));
        let mut field = extra.get(4..4 + len)?;
        if u16_at(extra, 0) == 1 {
            for value in values.iter_mut().filter(|value| **value == u64::from(u32::MAX)) {
                *value = little_endian(field.get(..8)?);
                field = &field[8..];
            }
            return Some(values);
        }
        extra = &extra[4 + len..];
    }
    None
}

fn array(at: At, name: &str, data: usize, len: usize) -> Result<NpzArray, LoadError> {
    let wrong = |expected: &str, found: String| LoadError::Entry {
        file: at.file.to_path_buf(),
        tensor: name.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let bytes = at.slice(data, len, "the entry's bytes")?;
    let (header_len, start) = match bytes {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, low, high, ..] => {
            (usize::from(u16::from_le_bytes([*low, *high])), 10)
        }
        [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d, ..] => {
            (place(u64::from(u32::from_le_bytes([*a, *b, *c, *d]))), 12)
        }
        other => {
            return Err(wrong(
                "an array of npy version 1 to 3",
                format!("{:02x?}", &other[..other.len().min(8)]),
            ));
        }
    };
    if header_len > MAX_ARRAY_HEADER_BYTES.min(bytes.len() - start) {
        return Err(wrong("an array header inside its entry", format!("{header_len} bytes")));
    }
    let text = String::from_utf8_lossy(&bytes[start..start + header_len]);
    let shown = || text.trim().chars().take(80).collect::<String>();
    let value_of = |key: &str| {
        let (_, rest) = text.split_once(&format!("'{key}'"))?;
        Some(rest.trim_start().strip_prefix(':')?.trim_start())
    };
    let descr = value_of("descr").and_then(|rest| rest.strip_prefix('\'')?.split('\'').next());
    let descr = descr.ok_or_else(|| wrong("a plain dtype", shown()))?;
    let offset = data + start + header_len;
    let dtype = dtype_of(descr).ok_or_else(|| LoadError::UnknownDType {
        file: at.file.to_path_buf(),
        tensor: name.to_owned(),
        offset: offset as u64,
        expected: "little-endian f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1 c8 c16".to_owned(),
        found: descr.to_owned(),
    })?;
    let dims = value_of("shape").and_then(dims_of).ok_or_else(|| wrong("a shape", shown()))?;
    let fortran = match value_of("fortran_order") {
        Some(rest) if rest.starts_with("True") => true,
        Some(rest) if rest.starts_with("False") => false,
        _ => return Err(wrong("fortran_order", shown())),
    };
    if fortran && dims.iter().filter(|&&dim| dim != 1).count() > 1 {
        return Err(wrong("C order (save numpy.ascontiguousarray of it)", "Fortran order".to_owned()));
    }
    let bytes = len - start - header_len;
    check_length(at.file, name, offset as u64, dtype, &dims, bytes as u64)?;
    Ok(NpzArray { name: name.to_owned(), dtype, dims, offset, bytes })
}

fn dtype_of(descr: &str) -> Option<DType> {
    Some(match descr {
        "|b1" => DType::Bool,
        "|i1" => DType::I8,
        "|u1" => DType::U8,
        "<f2" => DType::F16,
        "<f4" => DType::F32,
        "<f8" => DType::F64,
        "<i2" => DType::I16,
        "<i4" => DType::I32,
        "<i8" => DType::I64,
        "<u2" => DType::U16,
        "<u4" => DType::U32,
        "<u8" => DType::U64,
        "<c8" => DType::C64,
        "<c16" => DType::C128,
        _ => return None,
    })
}

fn dims_of(text: &str) -> Option<Vec<usize>> {
    let (inside, _) = text.strip_prefix('(')?.split_once(')')?;
    let parts: Vec<&str> = inside.split(',').map(str::trim).collect();
    let (last, leading) = parts.split_last()?;
    let dims: Option<Vec<usize>> = leading.iter().map(|part| part.parse().ok()).collect();
    let mut dims = dims?;
    // `()`, `(3,)` and `(3, 4)` are tuples, `(3)` is not.
    match (last.is_empty(), dims.is_empty()) {
        (true, _) => {}
        (false, true) => return None,
        (false, false) => dims.push(last.parse().ok()?),
    }
    Some(dims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::BytesWeightLoader;

    fn npy(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
        text.push_str(&" ".repeat(63 - (10 + text.len()) % 64));
        text.push('\n');
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend((text.len() as u16).to_le_bytes());
        file.extend(text.as_bytes());
        file.extend(data);
        file
    }

    fn zip(entries: &[(&str, Vec<u8>)], method: u16) -> Vec<u8> {
        let (mut file, mut directory) = (Vec::new(), Vec::new());
        for (name, data) in entries {
            let (local, len) = (file.len() as u32, data.len() as u32);
            let shared = |out: &mut Vec<u8>| {
                for half in [20u16, 0, method, 0, 0] {
                    out.extend(half.to_le_bytes());
                }
                for word in [0, len, len] {
                    out.extend(word.to_le_bytes());
                }
                out.extend((name.len() as u16).to_le_bytes());
                out.extend(0u16.to_le_bytes());
            };
            file.extend(b"PK\x03\x04");
            shared(&mut file);
            file.extend(name.as_bytes());
            file.extend(data);
            directory.extend(b"PK\x01\x02\x14\x00");
            shared(&mut directory);
            directory.extend([0; 10]);
            directory.extend(local.to_le_bytes());
            directory.extend(name.as_bytes());
        }
        let (start, count) = (file.len() as u32, entries.len() as u16);
        file.extend(&directory);
        file.extend(b"PK\x05\x06\0\0\0\0");
        file.extend(count.to_le_bytes());
        file.extend(count.to_le_bytes());
        file.extend((directory.len() as u32).to_le_bytes());
        file.extend(start.to_le_bytes());
        file.extend([0; 2]);
        file
    }

    fn one(array: Vec<u8>) -> Result<Vec<NpzArray>, LoadError> {
        parse_npz(Path::new("w.npz"), &zip(&[("w.npy", array)], 0))
    }

    #[test]
    fn stored_arrays_are_borrowed_in_file_order() {
        let z = npy("<f4", "False", "(2, 1)", &[0, 0, 128, 63, 0, 0, 0, 64]);
        let a = npy("|u1", "False", "(3,)", &[1, 2, 3]);
        let file = zip(&[("z.npy", z), ("a.npy", a), ("s.npy", npy("<i8", "False", "()", &[1; 8]))], 0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.npz");
        std::fs::write(&path, &file).unwrap();
        let (mapped, held) = (NpzLoader::open(&path).unwrap(), BytesWeightLoader::from_npz(file).unwrap());
        for loader in [&mapped as &dyn WeightLoader, &held] {
            assert_eq!(loader.names().collect::<Vec<_>>(), ["z", "a", "s"]);
            let view = loader.tensor("z").unwrap().unwrap();
            assert_eq!((view.dtype, view.dims, view.bytes.len()), (DType::F32, &[2, 1][..], 8));
            assert_eq!(loader.tensor_bytes("a").unwrap(), Some(&[1u8, 2, 3][..]));
            assert!(loader.tensor("s").unwrap().unwrap().dims.is_empty());
            assert!(loader.tensor("b").unwrap().is_none());
        }
        assert!(matches!(mapped.storage("a").unwrap(), Some(WeightBytes::Mapped(_))));
    }

    #[test]
    fn compressed_entries_are_refused_with_the_way_out() {
        let file = zip(&[("w.npy", npy("|u1", "False", "(1,)", &[1]))], 8);
        let text = parse_npz(Path::new("w.npz"), &file).unwrap_err().to_string();
        assert!(text.contains("numpy.savez") && text.contains("`w.npy`"), "{text}");
    }

    #[test]
    fn arrays_that_are_not_plain_little_endian_c_order_are_refused() {
        assert!(one(npy("<f4", "True", "(4, 1)", &[0; 16])).is_ok());
        assert!(matches!(one(npy("<f4", "True", "(2, 2)", &[0; 16])), Err(LoadError::Entry { .. })));
        assert!(matches!(one(npy(">f4", "False", "(1,)", &[0; 4])), Err(LoadError::UnknownDType { .. })));
        assert!(matches!(one(npy("|O", "False", "(1,)", &[0; 4])), Err(LoadError::UnknownDType { .. })));
        assert!(matches!(one(npy("<f4", "False", "(2,)", &[0; 4])), Err(LoadError::Length { .. })));
        assert!(matches!(one(npy("<f4", "False", "(-1,)", &[0; 4])), Err(LoadError::Entry { .. })));
        assert!(matches!(one(npy("<f4", "False", "(1)", &[0; 4])), Err(LoadError::Entry { .. })));
        let huge = format!("({}, 8)", 1u64 << 62);
        assert!(matches!(one(npy("<f4", "False", &huge, &[0; 4])), Err(LoadError::Size { .. })));
        assert!(matches!(one(b"PK not an array".to_vec()), Err(LoadError::Entry { .. })));
    }

    #[test]
    fn duplicate_names_and_overlapping_entries_are_refused() {
        let array = || npy("|u1", "False", "(1,)", &[1]);
        let twice = zip(&[("w.npy", array()), ("w.npy", array())], 0);
        assert!(matches!(BytesWeightLoader::from_npz(twice), Err(LoadError::Duplicate { .. })));
        let mut file = zip(&[("a.npy", array()), ("b.npy", array())], 0);
        let second = file.windows(4).rposition(|four| four == b"PK\x01\x02").unwrap();
        file[second + 42..second + 46].fill(0);
        let overlap = parse_npz(Path::new("w.npz"), &file);
        assert!(matches!(overlap, Err(LoadError::Overlap { .. })), "{overlap:?}");
    }

    #[test]
    fn truncated_and_flipped_archives_never_reach_outside_the_file() {
        let whole = zip(
            &[("a.npy", npy("<f4", "False", "(2,)", &[0; 8])), ("b.npy", npy("|u1", "False", "(1,)", &[1]))],
            0,
        );
        for length in 0..whole.len() {
            assert!(parse_npz(Path::new("w"), &whole[..length]).is_err(), "{length}");
        }
        for at in 0..whole.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut file = whole.clone();
                file[at] ^= flip;
                for array in parse_npz(Path::new("w"), &file).unwrap_or_default() {
                    assert!(array.offset + array.bytes <= file.len());
                }
            }
        }
    }

    #[test]
    fn sizes_in_the_zip64_field_replace_only_those_that_overflowed() {
        let mut extra = vec![1, 0, 16, 0];
        extra.extend(7u64.to_le_bytes());
        extra.extend(9u64.to_le_bytes());
        let full = u64::from(u32::MAX);
        assert_eq!(widened([full, 5, full], &extra), Some([7, 5, 9]));
        assert_eq!(widened([1, 2, 3], &[]), Some([1, 2, 3]));
        assert_eq!(widened([full, 2, 3], &[]), None);
        assert_eq!(widened([full, full, full], &extra), None);
    }
}
