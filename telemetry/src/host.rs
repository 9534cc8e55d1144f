//! The machine's CPU, memory and network, read by sysinfo at each collection.
//!
//! Names and units are OpenTelemetry's (<https://opentelemetry.io/docs/specs/semconv/system/system-metrics/>).
//! One reading serves all instruments of a collection, because it is refreshed at most once a second.

use opentelemetry::{KeyValue, metrics::Meter};
use std::{
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use sysinfo::{Networks, System};

/// The age at which a reading is refreshed. sysinfo needs 200 ms between two readings of the CPU, and scrapes are
/// seconds apart.
const FRESH: Duration = Duration::from_secs(1);

struct Reading {
    at: Instant,
    system: System,
    networks: Networks,
}

#[derive(Clone)]
struct Host(Arc<Mutex<Reading>>);

impl Host {
    /// `None` on a machine that sysinfo does not support.
    fn new() -> Option<Self> {
        let mut system = System::new().ok()?;
        system.refresh_cpu_usage();
        system.refresh_memory();
        let networks = Networks::new_with_refreshed_list().ok()?;
        Some(Self(Arc::new(Mutex::new(Reading { at: Instant::now(), system, networks }))))
    }

    fn read(&self) -> MutexGuard<'_, Reading> {
        // A panic elsewhere must not end the collecting thread; the last reading is still usable.
        let mut reading = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if reading.at.elapsed() >= FRESH {
            reading.system.refresh_cpu_usage();
            reading.system.refresh_memory();
            reading.networks.refresh(true);
            reading.at = Instant::now();
        }
        reading
    }
}

/// Registers the instruments.
pub(crate) fn observe(meter: &Meter) {
    let Some(host) = Host::new() else { return };
    cpu(meter, host.clone());
    memory(meter, &host);
    network(meter, &host);
}

fn cpu(meter: &Meter, host: Host) {
    let logical = host.clone();
    meter
        .i64_observable_up_down_counter("system.cpu.logical.count")
        .with_unit("{cpu}")
        .with_description("logical CPUs of the machine")
        .with_callback(move |observer| {
            observer.observe(signed(logical.read().system.cpus().len() as u64), &[]);
        })
        .build();
    meter
        .f64_observable_gauge("system.cpu.utilization")
        .with_unit("1")
        .with_description("share of the machine's CPU time in use, 0 to 1")
        .with_callback(move |observer| {
            let percent = f64::from(host.read().system.global_cpu_usage());
            observer.observe((percent / 100.0).clamp(0.0, 1.0), &[]);
        })
        .build();
    meter
        .f64_observable_counter("system.cpu.time")
        .with_unit("s")
        .with_description("CPU time of the machine")
        .with_callback(|observer| {
            let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
            let hz = rustix::param::clock_ticks_per_second() as f64;
            for (mode, ticks) in cpu_ticks(&stat) {
                observer.observe(ticks as f64 / hz, &[KeyValue::new("cpu.mode", mode)]);
            }
        })
        .build();
}

/// The first line of proc(5) `stat`, by mode.
fn cpu_ticks(stat: &str) -> Vec<(&'static str, u64)> {
    const MODES: [&str; 8] =
        ["user", "nice", "system", "idle", "iowait", "interrupt", "softirq", "steal"];
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "));
    let numbers = line.unwrap_or_default().split_ascii_whitespace().map_while(|n| n.parse().ok());
    MODES.into_iter().zip(numbers).collect()
}

fn memory(meter: &Meter, host: &Host) {
    let usage = host.clone();
    meter
        .i64_observable_up_down_counter("system.memory.usage")
        .with_unit("By")
        .with_description("memory of the machine by state")
        .with_callback(move |observer| {
            let reading = usage.read();
            let (used, total) = (reading.system.used_memory(), reading.system.total_memory());
            let state = |s: &'static str| [KeyValue::new("system.memory.state", s)];
            observer.observe(signed(used), &state("used"));
            observer.observe(signed(total.saturating_sub(used)), &state("free"));
        })
        .build();
    let limit = host.clone();
    meter
        .i64_observable_up_down_counter("system.memory.limit")
        .with_unit("By")
        .with_description("memory the machine has")
        .with_callback(move |observer| {
            observer.observe(signed(limit.read().system.total_memory()), &[]);
        })
        .build();
    let share = host.clone();
    meter
        .f64_observable_gauge("system.memory.utilization")
        .with_unit("1")
        .with_description("share of the machine's memory in use, 0 to 1")
        .with_callback(move |observer| {
            let reading = share.read();
            let total = reading.system.total_memory();
            if total > 0 {
                observer.observe(reading.system.used_memory() as f64 / total as f64, &[]);
            }
        })
        .build();
}

/// The received and sent numbers of one interface.
type Pair = fn(&sysinfo::NetworkData) -> (u64, u64);

fn network(meter: &Meter, host: &Host) {
    let instruments: [(&str, &str, &str, Pair); 3] = [
        ("system.network.io", "By", "bytes received and sent by the machine", |n| {
            (n.total_received(), n.total_transmitted())
        }),
        ("system.network.packets", "{packet}", "packets received and sent by the machine", |n| {
            (n.total_packets_received(), n.total_packets_transmitted())
        }),
        ("system.network.errors", "{error}", "network errors of the machine", |n| {
            (n.total_errors_on_received(), n.total_errors_on_transmitted())
        }),
    ];
    for (name, unit, description, read) in instruments {
        let host = host.clone();
        meter
            .u64_observable_counter(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |observer| {
                for (interface, network) in &host.read().networks {
                    let (received, sent) = read(network);
                    for (value, direction) in [(received, "receive"), (sent, "transmit")] {
                        let interface = KeyValue::new(
                            "network.interface.name",
                            interface.to_string_lossy().into_owned(),
                        );
                        let direction = KeyValue::new("network.io.direction", direction);
                        observer.observe(value, &[interface, direction]);
                    }
                }
            })
            .build();
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_split_by_mode() {
        let ticks = cpu_ticks("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 1 1 1\n");
        assert_eq!(ticks.first(), Some(&("user", 1)));
        assert_eq!(ticks.last(), Some(&("steal", 8)));
        assert!(cpu_ticks("").is_empty());
    }
}
