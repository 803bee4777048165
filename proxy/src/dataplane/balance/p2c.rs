//! The power of two choices: of two drawn candidates the less loaded one.
//!
//! Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing". One look at two loads keeps the longest
//! queue short, and unlike "the least loaded of all" it does not send everybody to the same place at once. Pure.

use crate::base::random::Dice;

/// One of `count` candidates, which `nth` tells one by one; `None` if there is none. Of two that are equally loaded the one
/// that was drawn first.
pub(super) fn choose<T: Copy>(
    count: usize,
    nth: impl Fn(usize) -> Option<T>,
    load: impl Fn(T) -> usize,
    dice: &mut Dice,
) -> Option<T> {
    let first = dice.below(count);
    let one = nth(first)?;
    if count < 2 {
        return Some(one);
    }
    // Drawn among the others: the place of the first one is left out.
    let drawn = dice.below(count - 1);
    let second = if drawn < first { drawn } else { drawn + 1 };
    let Some(other) = nth(second) else { return Some(one) };
    Some(if load(other) < load(one) { other } else { one })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each of these loads is chosen in 10,000 draws.
    fn shares(loads: &[usize]) -> Vec<usize> {
        let mut dice = Dice::from_seed(1);
        let mut chosen = vec![0; loads.len()];
        for _ in 0..10_000 {
            let place = choose(loads.len(), |place| (place < loads.len()).then_some(place), |place| loads[place], &mut dice);
            chosen[place.unwrap()] += 1;
        }
        chosen
    }

    #[test]
    fn nobody_is_chosen_from_nobody_and_the_only_one_always() {
        assert_eq!(choose(0, |_| None::<usize>, |_| 0, &mut Dice::from_seed(1)), None);
        assert_eq!(shares(&[7]), [10_000]);
    }

    #[test]
    fn equals_get_equal_shares() {
        assert!(shares(&[0, 0, 0, 0]).iter().all(|share| (2_300..2_700).contains(share)));
    }

    #[test]
    fn the_most_loaded_one_gets_nothing() {
        let shares = shares(&[0, 0, 100]);
        assert_eq!(shares[2], 0);
        assert!(shares[..2].iter().all(|share| (4_700..5_300).contains(share)));
        assert_eq!(self::shares(&[5, 4]), [0, 10_000]);
    }

    proptest! {
        #[test]
        fn what_is_chosen_is_there(count in 0_usize..20, there in 0_usize..20, seed: u64) {
            // Candidates can become fewer between counting and choosing.
            let chosen = choose(count, |place| (place < there).then_some(place), |place| place, &mut Dice::from_seed(seed));
            prop_assert!(chosen.is_none_or(|place| place < there && place < count.max(1)));
            prop_assert!(chosen.is_some() || there < count || count == 0 || there == 0);
        }
    }
}
