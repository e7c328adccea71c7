//! Little-endian fields, length-prefixed bytes. Reading is bounded by the bytes that are there.

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {reason}")]
pub struct WireError {
    /// Where the field starts.
    pub at: usize,
    /// What is wrong.
    pub reason: &'static str,
}

/// Appends fields.
#[derive(Debug, Clone, Default)]
pub struct WireWriter {
    bytes: Vec<u8>,
}

impl WireWriter {
    /// Nothing written yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A number of 8 bits.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// A number of 32 bits.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// A number of 64 bits.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Bytes after their length.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.u64(value.len() as u64);
        self.bytes.extend_from_slice(value);
        self
    }

    /// Text after its length.
    pub fn text(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    /// As many bytes as the reader knows there to be.
    pub fn raw(&mut self, value: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(value);
        self
    }

    /// What was written.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields in the order they were written.
#[derive(Debug, Clone)]
pub struct WireReader<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> WireReader<'b> {
    /// Reads from the start.
    pub fn new(bytes: &'b [u8]) -> Self {
        WireReader { bytes, at: 0 }
    }

    /// An error at the next field.
    pub fn fault(&self, reason: &'static str) -> WireError {
        WireError { at: self.at, reason }
    }

    /// The next `len` bytes.
    pub fn raw(&mut self, len: usize) -> Result<&'b [u8], WireError> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.fault("the bytes end within a field"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let taken = self.raw(N)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    /// A number of 8 bits.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// A number of 32 bits.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// A number of 64 bits.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of 64 bits that is a size here.
    pub fn size(&mut self) -> Result<usize, WireError> {
        let at = self.at;
        let value = self.u64()?;
        usize::try_from(value)
            .map_err(|_| WireError { at, reason: "a size exceeds this machine's addresses" })
    }

    /// How many entries follow, of at least `least` bytes each: never more than the bytes can hold.
    pub fn count(&mut self, least: usize) -> Result<usize, WireError> {
        let at = self.at;
        let count = self.size()?;
        let room = (self.bytes.len() - self.at) / least.max(1);
        if count <= room { Ok(count) } else { Err(WireError { at, reason: "more entries than bytes" }) }
    }

    /// A digest.
    pub fn digest(&mut self) -> Result<[u8; 32], WireError> {
        self.array()
    }

    /// Bytes after their length.
    pub fn bytes(&mut self) -> Result<&'b [u8], WireError> {
        let len = self.count(1)?;
        self.raw(len)
    }

    /// Text after its length.
    pub fn text(&mut self) -> Result<&'b str, WireError> {
        let at = self.at;
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes).map_err(|_| WireError { at, reason: "text is not UTF-8" })
    }

    /// Nothing may follow.
    pub fn end(&self) -> Result<(), WireError> {
        if self.at == self.bytes.len() { Ok(()) } else { Err(self.fault("bytes are left over")) }
    }
}
