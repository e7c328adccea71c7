//! Keys of caches: the same on every run and machine, and different wherever one field differs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// What a cached thing depends on, field by field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyFields(BTreeMap<String, Vec<u8>>);

impl KeyFields {
    /// No fields.
    pub fn new() -> Self {
        Self::default()
    }

    /// With a field more; a field of the same name is replaced.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.0.insert(name.to_owned(), value.as_ref().to_vec());
        self
    }

    /// The key: fields in order of their names, each name and value behind its length, so that no two lists of fields are one text.
    pub fn key(&self) -> CacheKey {
        let mut bytes = b"rlx key 1\0".to_vec();
        let mut put = |part: &[u8]| {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        };
        put(&(self.0.len() as u64).to_le_bytes());
        for (name, value) in &self.0 {
            put(name.as_bytes());
            put(value);
        }
        CacheKey { digest: *blake3::hash(&bytes).as_bytes(), bytes: bytes.into() }
    }
}

/// A key with its BLAKE3 digest. Two keys are equal if all their bytes are, not their digests alone.
#[derive(Clone, PartialEq, Eq)]
pub struct CacheKey {
    digest: [u8; 32],
    bytes: Arc<[u8]>,
}

impl CacheKey {
    /// The digest in hexadecimal: names files.
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.digest).to_hex().to_string()
    }

    /// Everything the key says.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl std::hash::Hash for CacheKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl fmt::Debug for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CacheKey({})", self.hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_same_everywhere_and_whatever_the_order_of_its_fields() {
        let a = KeyFields::new().with("device", "cpu").with("batch", 3u64.to_le_bytes());
        let b = KeyFields::new().with("batch", 3u64.to_le_bytes()).with("device", "cpu");
        assert_eq!(a.key(), b.key());
        assert_eq!(a.key().hex(), GOLDEN);
        assert_eq!(a.key().bytes().len(), 10 + 16 + (8 + 5 + 8 + 8) + (8 + 6 + 8 + 3));
    }

    /// Computed once; another value would make every stored key foreign.
    const GOLDEN: &str = "e45cc3b1382eb8ff96dfe3f542a50efd1fe47452f1077cf64d9ae4d769cedd3f";

    #[test]
    fn fields_cannot_run_into_each_other() {
        let key = |fields: &[(&str, &str)]| {
            fields.iter().fold(KeyFields::new(), |k, (name, value)| k.with(name, value)).key()
        };
        let keys = [
            key(&[("a", "bc")]),
            key(&[("ab", "c")]),
            key(&[("a", "b"), ("c", "")]),
            key(&[("a", ""), ("b", "c")]),
            key(&[]),
        ];
        for (i, a) in keys.iter().enumerate() {
            for b in &keys[i + 1..] {
                assert_ne!(a, b);
                assert_ne!(a.hex(), b.hex());
            }
        }
    }
}
