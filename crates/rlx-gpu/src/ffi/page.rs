//! The device of the page that a module runs in.
#![expect(unsafe_code, reason = "functions of the page take addresses")]

mod imports {
    #[link(wasm_import_module = "gpu")]
    unsafe extern "C" {
        /// Writes what the device is, as lines `key value`; the length, which may be beyond the room.
        pub fn describe(to: *mut u8, room: usize) -> usize;
        /// Writes what went wrong last.
        pub fn message(to: *mut u8, room: usize) -> usize;
        /// Makes a buffer: 0 for the kernels, 1 for results.
        pub safe fn buffer(words: usize, purpose: u32) -> u32;
        /// Frees a buffer or a kernel.
        pub safe fn free(id: u32);
        pub fn write(buffer: u32, at: usize, from: *const u32, words: usize);
        /// Begins to compile a kernel.
        pub fn pipeline(
            name: *const u8,
            name_len: usize,
            text: *const u8,
            text_len: usize,
            weights: u32,
            states: u32,
        ) -> u32;
        /// Submits a run.
        pub fn submit(job: *const u32, words: usize);
        /// Waits for all that was asked of the device, and reads words of a buffer of results. Not 0: see `message`.
        pub fn finish(results: u32, to: *mut u32, words: usize) -> u32;
    }
}

/// A call that writes text: how long it is, and again with room for it.
fn written(call: unsafe extern "C" fn(*mut u8, usize) -> usize) -> String {
    let mut text = vec![0u8; 1024];
    loop {
        // SAFETY: the text has the room that is told.
        let len = unsafe { call(text.as_mut_ptr(), text.len()) };
        if len <= text.len() {
            text.truncate(len);
            return String::from_utf8_lossy(&text).into_owned();
        }
        text.resize(len, 0);
    }
}

/// What the device is; nothing if the page has opened none.
pub(crate) fn describe() -> String {
    written(imports::describe)
}

/// A buffer of the device, freed when it is dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub id: u32,
    pub words: usize,
}

impl Buffer {
    pub fn of_kernels(words: usize) -> Self {
        Buffer { id: imports::buffer(words.max(1), 0), words }
    }

    pub fn of_results(words: usize) -> Self {
        Buffer { id: imports::buffer(words.max(1), 1), words }
    }

    /// Writes words from an offset on; what lies beyond the buffer is refused by the device.
    pub fn write(&self, at: usize, words: &[u32]) {
        // SAFETY: the page reads the words before it returns.
        unsafe { imports::write(self.id, at, words.as_ptr(), words.len()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        imports::free(self.id);
    }
}

/// A kernel of the device, freed when it is dropped. It may be used once [`finish`] has found nothing wrong.
#[derive(Debug)]
pub(crate) struct Pipeline(pub u32);

impl Pipeline {
    /// From its text, which binds so many weights and states.
    pub fn new(name: &str, text: &str, [weights, states]: [u32; 2]) -> Self {
        let (at, len) = (text.as_ptr(), text.len());
        // SAFETY: the page reads both texts before it returns.
        Pipeline(unsafe { imports::pipeline(name.as_ptr(), name.len(), at, len, weights, states) })
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        imports::free(self.0);
    }
}

pub(crate) fn submit(job: &[u32]) {
    // SAFETY: the page reads the words before it returns.
    unsafe { imports::submit(job.as_ptr(), job.len()) }
}

/// Waits for everything asked so far; what went wrong is the error. Words are read from the start of a buffer of results, if one is given.
pub(crate) fn finish(results: Option<(&Buffer, usize)>) -> Result<Vec<u32>, String> {
    let (id, count) = results.map_or((0, 0), |(buffer, words)| (buffer.id, words.min(buffer.words)));
    let mut words = vec![0u32; count];
    // SAFETY: `words` has the room that is told, and stays where it is until the call ends.
    match unsafe { imports::finish(id, words.as_mut_ptr(), count) } {
        0 => Ok(words),
        _ => Err(written(imports::message)),
    }
}
