//! What the kernel says of this process, under the names that every Prometheus client uses for it.
//!
//! Sources: proc(5). Own lines instead of a library: six numbers are read, at the moment of a scrape.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, Opts};

/// CPU time, memory, descriptors, threads and start of this process.
#[derive(Debug)]
pub(crate) struct ProcessCollector {
    cpu: prometheus::Counter,
    resident: Gauge,
    virtual_memory: Gauge,
    descriptors: Gauge,
    descriptors_max: Gauge,
    threads: Gauge,
    start: Gauge,
}

impl ProcessCollector {
    /// Registers nothing by itself.
    ///
    /// # Errors
    /// A name is not one, which a test rules out.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let gauge = |name, help| Gauge::with_opts(Opts::new(name, help));
        Ok(Self {
            cpu: prometheus::Counter::new("process_cpu_seconds_total", "User and system CPU time spent, in seconds.")?,
            resident: gauge("process_resident_memory_bytes", "Resident memory in bytes.")?,
            virtual_memory: gauge("process_virtual_memory_bytes", "Virtual memory in bytes.")?,
            descriptors: gauge("process_open_fds", "Open file descriptors.")?,
            descriptors_max: gauge("process_max_fds", "Most file descriptors that may be open.")?,
            threads: gauge("process_threads", "Threads.")?,
            start: gauge("process_start_time_seconds", "When the process started, in seconds since the epoch.")?,
        })
    }

    fn read(&self) {
        if let Some(stat) = std::fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
            let cpu = stat.cpu_ticks / TICKS_PER_SECOND;
            // A counter only grows; the difference is what was spent since the last scrape.
            self.cpu.inc_by((cpu - self.cpu.get()).max(0.0));
            self.virtual_memory.set(stat.virtual_bytes);
            self.threads.set(stat.threads);
            if let Some(boot) = boot_time() {
                self.start.set(boot + stat.start_ticks / TICKS_PER_SECOND);
            }
        }
        if let Some(kib) = number_after("/proc/self/status", "VmRSS:") {
            self.resident.set(kib * 1024.0);
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            // The directory that is being read is open itself.
            #[expect(clippy::cast_precision_loss, reason = "descriptors of one process are far below 2^52")]
            self.descriptors.set(entries.count().saturating_sub(1) as f64);
        }
        if let Some(max) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            #[expect(clippy::cast_precision_loss, reason = "a limit on descriptors is far below 2^52")]
            self.descriptors_max.set(max as f64);
        }
    }

    fn parts(&self) -> [&dyn Collector; 7] {
        [&self.cpu, &self.resident, &self.virtual_memory, &self.descriptors, &self.descriptors_max, &self.threads, &self.start]
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

/// The fields of `/proc/self/stat` that are told.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: f64,
    threads: f64,
    start_ticks: f64,
    virtual_bytes: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The program's name stands in parentheses and may hold anything, parentheses too: count from the last one.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // proc(5) counts from 1 and the rest begins at field 3.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self { cpu_ticks: field(14)? + field(15)?, threads: field(20)?, start_ticks: field(22)?, virtual_bytes: field(23)? })
    }
}

fn boot_time() -> Option<f64> {
    number_after("/proc/stat", "btime")
}

/// The number that follows `word` at the beginning of a line.
fn number_after(path: &str, word: &str) -> Option<f64> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(word))?.split_ascii_whitespace().next()?.parse().ok()
}

/// `USER_HZ`: fixed by the kernel's interface to user space, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_shifts_no_field() {
        let text = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 3 0 900 4096 25 18446744073709551615";
        assert_eq!(Stat::parse(text), Some(Stat { cpu_ticks: 200.0, threads: 3.0, start_ticks: 900.0, virtual_bytes: 4096.0 }));
        assert_eq!(Stat::parse("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_is_told() {
        let process = ProcessCollector::new().unwrap();
        process.read();
        assert!(process.resident.get() > 1e5 && process.threads.get() >= 1.0 && process.descriptors.get() >= 3.0);
        assert!(process.start.get() > 1.5e9 && process.descriptors_max.get() > 0.0);
    }
}
