//! What happens when a mapped file shrinks between a check of its size and a read: a message that names the file, instead of a bare
//! signal.
//!
//! A program installs the guard once. Maps enter themselves in a table of fixed size that the signal's handler reads without a lock or
//! an allocation.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Maps that can be named; further ones end with a message that names none.
const SLOTS: usize = 512;
const NAME_BYTES: usize = 256;
const WORDS: usize = NAME_BYTES / size_of::<usize>();

struct Slot {
    /// 0: free; 1: being written.
    start: AtomicUsize,
    end: AtomicUsize,
    name: [AtomicUsize; WORDS],
}

#[expect(clippy::declare_interior_mutable_const, reason = "the initial value of a table of atomics")]
const FREE: Slot = Slot {
    start: AtomicUsize::new(0),
    end: AtomicUsize::new(0),
    name: [const { AtomicUsize::new(0) }; WORDS],
};

static TABLE: [Slot; SLOTS] = [FREE; SLOTS];

/// A map's entry in the table, until it is dropped.
#[derive(Debug)]
pub(super) struct Watched(Option<usize>);

impl Watched {
    /// Enters the map of a file; a full table leaves it out.
    pub(super) fn new(bytes: &[u8], path: &Path) -> Watched {
        let range = bytes.as_ptr_range();
        let (start, end) = (range.start as usize, range.end as usize);
        if start == end {
            return Watched(None);
        }
        let name = path.as_os_str().as_encoded_bytes();
        let name = &name[name.len().saturating_sub(NAME_BYTES)..];
        let taken =
            |slot: &Slot| slot.start.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let index = TABLE.iter().position(taken);
        if let Some(slot) = index.map(|index| &TABLE[index]) {
            for (at, word) in slot.name.iter().enumerate() {
                let mut bytes = [0; size_of::<usize>()];
                for (byte, from) in bytes.iter_mut().zip(name.iter().skip(at * size_of::<usize>())) {
                    *byte = *from;
                }
                word.store(usize::from_ne_bytes(bytes), Ordering::Relaxed);
            }
            slot.end.store(end, Ordering::Relaxed);
            slot.start.store(start, Ordering::Release);
        }
        Watched(index)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(index) = self.0 {
            TABLE[index].start.store(0, Ordering::Release);
        }
    }
}

/// The entry of the map that holds an address: its name, padded with zeros.
#[cfg(unix)]
fn find(address: usize) -> Option<[u8; NAME_BYTES]> {
    for slot in &TABLE {
        let (start, end) = (slot.start.load(Ordering::Acquire), slot.end.load(Ordering::Relaxed));
        if start > 1 && (start..end).contains(&address) {
            let mut name = [0; NAME_BYTES];
            for (bytes, word) in name.chunks_exact_mut(size_of::<usize>()).zip(&slot.name) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
            return Some(name);
        }
    }
    None
}

/// Makes a read past the end of a mapped file end the process with a message that names the file and status 1. For programs, not
/// for libraries: the handler of a signal belongs to the process.
///
/// Does nothing where there is no such signal.
///
/// # Errors
/// The system's reason for refusing the handler.
pub fn install() -> std::io::Result<()> {
    #[cfg(unix)]
    unix::install()?;
    Ok(())
}

#[cfg(unix)]
#[expect(unsafe_code, reason = "mapped storage is one of the named places for unsafe")]
mod unix {
    use super::find;
    use std::io;

    extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the system passes a valid siginfo to a handler installed with SA_SIGINFO; for SIGBUS it holds an address.
        let address = unsafe { (*info).si_addr() } as usize;
        match find(address) {
            Some(name) => {
                write(b"error: a mapped file shrank or could not be read while it was in use\n   in: ");
                let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
                write(&name[..len]);
                write(b"\n  try: write model files anew and rename them, never in place; check the disk\n");
                // SAFETY: _exit is async-signal-safe and does not return.
                unsafe { libc::_exit(1) }
            }
            None => {
                // Not a map of ours: the fault happens again, with the system's own reaction.
                // SAFETY: signal is async-signal-safe, and SIG_DFL is a valid disposition.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
        }
    }

    fn write(bytes: &[u8]) {
        // SAFETY: write is async-signal-safe; the pointer and length are those of a slice. A failure has nowhere to be told.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
    }

    pub(super) fn install() -> io::Result<()> {
        // SAFETY: an all-zero sigaction is a valid value; its fields are set below.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is initialised, and the handler calls async-signal-safe functions only.
        let failed = unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
