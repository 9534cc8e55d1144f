//! Killed processes, full disks, lost networks, wrong clocks, and the system calls that make things durable.

mod crash;
mod full;
mod outside;
mod points;
mod syscalls;
mod workload;
