//! Ctrl-C: ends a turn while one is on, else the program.

use rlx_models::generate::CancelToken;
use std::sync::{Arc, Mutex, PoisonError};

/// Exit status of a program that an interrupt ended.
const INTERRUPTED: i32 = 130;

/// Where an interrupt goes.
#[derive(Clone, Default)]
pub struct Interrupt {
    turn: Arc<Mutex<Option<CancelToken>>>,
}

impl Interrupt {
    /// Takes over Ctrl-C. Where that is not possible, it ends the program as before.
    pub fn install() -> Self {
        let interrupt = Self::default();
        let handled = interrupt.clone();
        // Refused where a handler is there already, which then counts.
        let _refused = ctrlc::set_handler(move || handled.arrive()).is_err();
        interrupt
    }

    fn arrive(&self) {
        match &*self.turn.lock().unwrap_or_else(PoisonError::into_inner) {
            // A second one, while the first has not been heeded yet, ends the program.
            Some(turn) if !turn.is_cancelled() => turn.cancel(),
            _ => std::process::exit(INTERRUPTED),
        }
    }

    /// Begins a turn: an interrupt now cancels this token.
    pub fn turn(&self) -> CancelToken {
        let token = CancelToken::new();
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        token
    }

    /// Ends the turn.
    pub fn end_turn(&self) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_cancels_the_turn_that_is_on() {
        let interrupt = Interrupt::default();
        let first = interrupt.turn();
        interrupt.arrive();
        assert!(first.is_cancelled());
        interrupt.end_turn();
        assert!(!interrupt.turn().is_cancelled());
    }
}
