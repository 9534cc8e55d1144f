//! This process's CPU time, memory, threads and files, read from /proc at each collection.
//!
//! Names and units are OpenTelemetry's (<https://opentelemetry.io/docs/specs/semconv/system/process-metrics/>).
//! A value that cannot be read is left out of that collection.

use opentelemetry::{KeyValue, metrics::Meter};
use std::{
    fs,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

/// Registers the instruments.
pub(crate) fn observe(meter: &Meter) {
    cpu(meter);
    memory(meter);
    counts(meter);
    disk(meter);
    age(meter);
}

fn cpu(meter: &Meter) {
    meter
        .f64_observable_counter("process.cpu.time")
        .with_unit("s")
        .with_description("CPU time this process used")
        .with_callback(|observer| {
            let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
            if let Some((user, system)) = cpu_ticks(&stat) {
                let hz = rustix::param::clock_ticks_per_second() as f64;
                observer.observe(user as f64 / hz, &[KeyValue::new("cpu.mode", "user")]);
                observer.observe(system as f64 / hz, &[KeyValue::new("cpu.mode", "system")]);
            }
        })
        .build();
}

/// utime and stime of proc(5) `stat`: fields 14 and 15. The name in field 2 may contain spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn memory(meter: &Meter) {
    for (name, description, key) in [
        ("process.memory.usage", "resident memory of this process", "VmRSS:"),
        ("process.memory.virtual", "virtual memory of this process", "VmSize:"),
    ] {
        meter
            .i64_observable_up_down_counter(name)
            .with_unit("By")
            .with_description(description)
            .with_callback(move |observer| {
                if let Some(kib) = status(key) {
                    observer.observe(kib.saturating_mul(1024), &[]);
                }
            })
            .build();
    }
}

/// A number from /proc/self/status.
fn status(key: &str) -> Option<i64> {
    number_after(&fs::read_to_string("/proc/self/status").ok()?, key)
}

fn number_after(text: &str, key: &str) -> Option<i64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn counts(meter: &Meter) {
    meter
        .i64_observable_up_down_counter("process.thread.count")
        .with_unit("{thread}")
        .with_description("threads of this process")
        .with_callback(|observer| {
            if let Some(threads) = status("Threads:") {
                observer.observe(threads, &[]);
            }
        })
        .build();
    meter
        .i64_observable_up_down_counter("process.unix.file_descriptor.count")
        .with_unit("{file_descriptor}")
        .with_description("file descriptors this process has open")
        .with_callback(|observer| {
            if let Ok(open) = fs::read_dir("/proc/self/fd") {
                // Without the descriptor that reads the directory.
                let open = i64::try_from(open.count()).unwrap_or(i64::MAX);
                observer.observe(open.saturating_sub(1), &[]);
            }
        })
        .build();
}

fn disk(meter: &Meter) {
    meter
        .u64_observable_counter("process.disk.io")
        .with_unit("By")
        .with_description("bytes this process made the disks read and write")
        .with_callback(|observer| {
            let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
            for (key, direction) in [("read_bytes:", "read"), ("write_bytes:", "write")] {
                if let Some(bytes) = number_after(&io, key).and_then(|n| u64::try_from(n).ok()) {
                    observer.observe(bytes, &[KeyValue::new("disk.io.direction", direction)]);
                }
            }
        })
        .build();
}

fn age(meter: &Meter) {
    let begin = Instant::now();
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    meter
        .f64_observable_gauge("process.uptime")
        .with_unit("s")
        .with_description("time since telemetry started")
        .with_callback(move |observer| observer.observe(begin.elapsed().as_secs_f64(), &[]))
        .build();
    meter
        .f64_observable_gauge("process.start_time")
        .with_unit("s")
        .with_description("Unix time when telemetry started")
        .with_callback(move |observer| observer.observe(unix, &[]))
        .build();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_process_name() {
        let stat = "7 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 111 222 0 0";
        assert_eq!(cpu_ticks(stat), Some((111, 222)));
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn a_number_is_found_after_its_key() {
        assert_eq!(number_after("Name:\tx\nVmRSS:\t  12 kB\n", "VmRSS:"), Some(12));
        assert_eq!(number_after("Name:\tx\n", "VmRSS:"), None);
    }
}
