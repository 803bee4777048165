//! Pins of an earlier layout, taken over while connections go on.
//!
//! A map that changed stands beside its former self under another name. What that holds is copied; then each program is put in
//! the place of its former one, which no connection notices: the maps of what is on its way are the same to both. The former
//! map goes last. Whoever is killed in between left a mark of which the next start begins anew.

use std::fs;
use std::path::Path;

use aya::maps::{Map, MapData, MapError, PerCpuHashMap, PerCpuValues};
use proxy_common::counters::{COUNTERS, COUNTERS_LEN, Counters};
use proxy_common::{LAYOUT, LAYOUT_OLDEST};

use super::error::KernelError;
use super::links;
use crate::node::maps;

/// The counters of layout 3.
type Counters3 = [u64; 25];

/// What stands below `pins`: the layout and the print of the object, of which 0 says that it is not all in place.
///
/// # Errors
/// The mark cannot be read, or is of a layout that is not known here.
pub(super) fn found(pins: &Path) -> Result<Option<(u64, u64)>, KernelError> {
    // An agent of layout 3 takes the mark away while it replaces programs.
    let unmarked = || pins.join(COUNTERS).exists().then_some((3, 0));
    let found = maps::build(pins)?.or_else(unmarked);
    match found {
        Some((layout, _print)) if !(u64::from(LAYOUT_OLDEST)..=u64::from(LAYOUT)).contains(&layout) => {
            Err(KernelError::Layout { path: pins.to_owned(), found: layout })
        }
        found => Ok(found),
    }
}

/// Makes the maps of this layout that `found` has not, with what is known already.
///
/// # Errors
/// A map cannot be made, read or written.
pub(super) fn take_over(pins: &Path, found: u64) -> Result<(), KernelError> {
    if found < 4 {
        // An attempt that did not come to its end may be older than what was counted since.
        links::unpin(&maps::pin(pins, COUNTERS))?;
        maps::make(pins)?;
        lengthen_counters(pins)?;
    }
    if found < u64::from(LAYOUT) {
        // What layout 5 has besides is made as the programs are loaded: nothing of it was known before.
        tracing::info!(from = found, to = LAYOUT, "pins of an earlier layout are taken over");
    }
    Ok(())
}

/// Removes the maps of earlier layouts, which no program uses any more.
///
/// # Errors
/// The folder cannot be read, or a pin not be removed.
pub(super) fn forget_former(pins: &Path) -> Result<(), KernelError> {
    for entry in fs::read_dir(pins).map_err(|error| KernelError::file("list", pins, error))? {
        let entry = entry.map_err(|error| KernelError::file("list", pins, error))?;
        if entry.file_name().to_str().is_some_and(maps::is_former) {
            links::unpin(&entry.path())?;
        }
    }
    Ok(())
}

/// From layout 3: each pod's counters, with nothing counted of what is new. What is counted while the programs are replaced is
/// lost.
fn lengthen_counters(pins: &Path) -> Result<(), KernelError> {
    let failed = |error| KernelError::map(COUNTERS, error);
    let open = |path| MapData::from_pin(path).map(Map::PerCpuHashMap);
    let former = open(pins.join(COUNTERS)).and_then(PerCpuHashMap::<_, u64, Counters3>::try_from).map_err(failed)?;
    let mut now = open(maps::pin(pins, COUNTERS)).and_then(PerCpuHashMap::<_, u64, Counters>::try_from).map_err(failed)?;
    for entry in &former {
        let (cookie, counted) = entry.map_err(failed)?;
        maps::patiently(|| now.insert(cookie, lengthened(&counted)?, 0)).map_err(failed)?;
    }
    Ok(())
}

fn lengthened(counted: &PerCpuValues<Counters3>) -> Result<PerCpuValues<Counters>, MapError> {
    let longer = counted.iter().map(|cpu| {
        let mut counters = [0; COUNTERS_LEN];
        for (counter, count) in counters.iter_mut().zip(cpu) {
            *counter = *count;
        }
        Counters(counters)
    });
    PerCpuValues::try_from(longer.collect::<Vec<_>>()).map_err(|source| maps::system_call("count the CPUs", source).into())
}
