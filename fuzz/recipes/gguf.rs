//! Files of GGUF made from bytes, and what every file must satisfy: for the fuzz target and for the test that runs it in CI.

use std::path::Path;

use rlx::import::gguf::{Array, Metadata, TENSOR_TYPES, TensorEntry, Value, encode_header, parse_header};
use rlx::weights::{BytesWeightLoader, WeightLoader};

/// Runs one input and tells whether the file was accepted. An input whose first byte is 1 is a recipe, any other the file.
pub fn run(input: &[u8]) -> bool {
    match input.split_first() {
        Some((1, rest)) => file_of(rest).is_some_and(|file| check(&file)),
        _ => check(input),
    }
}

/// The file of a recipe: a valid frame of keys and tensors whose numbers the recipe replaces here and there, so that faults deep in
/// the header are reached.
pub fn file_of(recipe: &[u8]) -> Option<Vec<u8>> {
    Recipe(recipe).file()
}

/// Either an error, or tensors that lie in the file, do not overlap, and have the size of their shape.
pub fn check(file: &[u8]) -> bool {
    let Ok(header) = parse_header(Path::new("fuzz"), file) else {
        assert!(BytesWeightLoader::from_gguf(file).is_err());
        return false;
    };
    let covered: usize = header.tensors.iter().map(|tensor| tensor.bytes).sum();
    assert!(covered <= file.len());
    for tensor in &header.tensors {
        assert!(tensor.offset >= header.data_start && tensor.offset + tensor.bytes <= file.len());
        assert_eq!(tensor.offset % header.alignment, 0);
        assert_eq!(rlx_tensor::byte_count(&tensor.dims, tensor.dtype), Some(tensor.bytes));
    }
    let loader = BytesWeightLoader::from_gguf(file).expect("the header was accepted");
    assert_eq!(loader.len(), header.tensors.len());
    true
}

struct Recipe<'a>(&'a [u8]);

impl Recipe<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn value(&mut self) -> Value {
        let n = self.byte();
        match self.byte() % 9 {
            0 => Value::U8(n),
            1 => Value::I32(i32::from(n) - 128),
            2 => Value::U64(u64::from(n) << (n % 57)),
            3 => Value::F32(f32::from(n)),
            4 => Value::Bool(n & 1 == 1),
            5 => Value::String("x".repeat(usize::from(n))),
            6 => Value::Array(Array::String(vec!["t".to_owned(); usize::from(n % 9)])),
            7 => Value::Array(Array::F32(vec![1.0; usize::from(n % 9)])),
            _ => Value::Array(Array::U16(vec![7; usize::from(n % 9)])),
        }
    }

    fn file(&mut self) -> Option<Vec<u8>> {
        let mut metadata = Metadata::new(Path::new("fuzz"));
        let alignment = 8usize << (self.byte() % 5);
        metadata.insert("general.alignment", Value::U32(alignment as u32));
        for i in 0..self.byte() % 6 {
            let value = self.value();
            metadata.insert(&format!("k{i}"), value);
        }
        let mut tensors = Vec::new();
        for i in 0..self.byte() % 6 {
            let dtype = TENSOR_TYPES[usize::from(self.byte()) % TENSOR_TYPES.len()].1;
            let (block, _) = dtype.block();
            let mut dims: Vec<usize> = (0..self.byte() % 4).map(|_| usize::from(self.byte() % 5)).collect();
            dims.push(block * usize::from(self.byte() % 4));
            tensors.push(TensorEntry { name: format!("t{i}"), dims, dtype });
        }
        let mut file = encode_header(&metadata, &tensors, alignment)?;
        let data: usize =
            tensors.iter().filter_map(TensorEntry::bytes).map(|b| b.next_multiple_of(alignment)).sum();
        file.resize(file.len() + data, 0);
        for _ in 0..self.byte() % 5 {
            let at = usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % file.len();
            let patch = [[0u8; 8], [0xff; 8], [0, 0, 0, 0, 0, 0, 0, 0x40], [self.byte(); 8]];
            let patch = patch[usize::from(self.byte() % 4)];
            let width = (1usize << (self.byte() % 4)).min(file.len() - at);
            file[at..at + width].copy_from_slice(&patch[..width]);
        }
        if self.byte().is_multiple_of(4) {
            file.truncate(file.len().saturating_sub(usize::from(self.byte())));
        }
        Some(file)
    }
}
