//! Reads the front of a file byte by byte, checked, with the offset of every fault.

use std::path::Path;

use crate::weights::LoadError;

pub(super) struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a Path, bytes: &'a [u8]) -> Self {
        Cursor { file, bytes, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    pub(super) fn fault(
        &self,
        at: usize,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> LoadError {
        LoadError::Header {
            file: self.file.to_path_buf(),
            offset: at as u64,
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], LoadError> {
        let end = self.at.checked_add(count);
        match end.and_then(|end| Some((end, self.bytes.get(self.at..end)?))) {
            Some((end, bytes)) => {
                self.at = end;
                Ok(bytes)
            }
            None => {
                let found = format!("the end of the file after {}; it may be truncated", self.remaining());
                Err(self.fault(self.at, format!("{count} bytes of {what}"), found))
            }
        }
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        let at = self.at;
        let bytes = self.take(N, what)?;
        <[u8; N]>::try_from(bytes).map_err(|_| self.fault(at, format!("{N} bytes of {what}"), "fewer"))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `least_bytes` each: more than the rest of the file can hold is a fault.
    pub(super) fn count(&mut self, least_bytes: usize, what: &str) -> Result<usize, LoadError> {
        let at = self.at;
        let count = self.u64(what)?;
        let fits = usize::try_from(count)
            .ok()
            .filter(|count| count.checked_mul(least_bytes).is_some_and(|bytes| bytes <= self.remaining()));
        fits.ok_or_else(|| {
            let most = self.remaining().checked_div(least_bytes.max(1)).unwrap_or(0);
            let expected = format!("{what} of at most {most}, which is what the file has room for");
            self.fault(at, expected, count.to_string())
        })
    }

    /// A length, then as many bytes of UTF-8.
    pub(super) fn string(&mut self, limit: usize, what: &str) -> Result<&'a str, LoadError> {
        let start = self.at;
        let length = self.count(1, &format!("length of {what}"))?;
        if length > limit {
            let expected = format!("{what} of at most {limit} bytes");
            return Err(self.fault(start, expected, format!("{length} bytes")));
        }
        let at = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let at = at.saturating_add(error.valid_up_to());
            self.fault(at, format!("{what} in UTF-8"), "other bytes")
        })
    }
}
