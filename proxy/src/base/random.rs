//! Chance, from one seed: a run can be repeated by its seed, which is logged at start.

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// The dice of one worker. Not for keys or nonces.
#[derive(Debug)]
pub(crate) struct Dice(SmallRng);

impl Dice {
    /// Dice that fall the same way for the same seed.
    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// A number in `0..bound`; 0 when `bound` is 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { self.0.random_range(0..bound) }
    }

    /// A number in `0.0..1.0`.
    pub(crate) fn fraction(&mut self) -> f64 {
        self.0.random()
    }

    /// 64 random bits, for identifiers.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0.random()
    }
}
