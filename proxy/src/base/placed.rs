//! Large values that are made where they stay.
//!
//! `Box::pin(work())` makes the future first, asks for a place, and moves it there: a copy of all that it will ever keep, though
//! next to nothing of it is in use yet, and for a request that is several KiB. Asked for first, the place is what it is made in.

use std::pin::Pin;

/// A future in a place of its own.
#[inline(always)]
pub(crate) fn pinned<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(boxed(make))
}

/// A value in a place of its own.
#[inline(always)]
pub(crate) fn boxed<T>(make: impl FnOnce() -> T) -> Box<T> {
    let place = Box::new_uninit();
    Box::write(place, make())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_made_in_its_place_is_what_was_made() {
        assert_eq!(pinned(|| async { vec![1; 9] }).await, [1; 9]);
        assert_eq!(*boxed(|| [7_u64; 99]), [7; 99]);
    }
}
