//! The phase port: one byte that the guest writes says how far its boot is.
//!
//! Only the first write of each value counts, so that a guest which floods the port costs an exit
//! each and nothing else.

use std::sync::{Arc, Mutex, PoisonError};

use super::monotonic_ns;
use crate::bus::BusDevice;

/// The marks that a guest has made, each with the host's CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug, Default)]
pub struct PhaseMarks {
    marks: Mutex<Marks>,
}

#[derive(Debug)]
struct Marks {
    seen: [bool; 256],
    order: Vec<(u8, u64)>,
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            seen: [false; 256],
            order: Vec::new(),
        }
    }
}

impl PhaseMarks {
    /// All marks in the order they were made; at most 256.
    pub fn all(&self) -> Vec<(u8, u64)> {
        self.lock().order.clone()
    }

    fn mark(&self, phase: u8) {
        let now = monotonic_ns();
        let mut marks = self.lock();
        if !std::mem::replace(&mut marks.seen[usize::from(phase)], true) {
            marks.order.push((phase, now));
            tracing::debug!(phase, now, "the guest reached a phase");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The port itself: written byte by byte, reads all ones.
pub struct PhasePort {
    marks: Arc<PhaseMarks>,
}

impl PhasePort {
    /// A port that stamps into `marks`.
    pub fn new(marks: Arc<PhaseMarks>) -> Self {
        Self { marks }
    }
}

impl BusDevice for PhasePort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let [phase] = data {
            self.marks.mark(*phase);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_one_mark_of_each_value() {
        let marks = Arc::new(PhaseMarks::default());
        let port = PhasePort::new(Arc::clone(&marks));
        for round in 0..1000u32 {
            port.write(0, &[(round % 7) as u8]);
        }
        port.write(0, &[9, 9]);
        let phases: Vec<u8> = marks.all().iter().map(|mark| mark.0).collect();
        assert_eq!(phases, [0, 1, 2, 3, 4, 5, 6]);
    }
}
