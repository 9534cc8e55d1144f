//! Metrics, traces, logs and alerts, with real receivers.

mod alerts;
mod otlp_programs;
mod otlp_secrets;
mod prometheus;
mod telemetry_checklist;
mod telemetry_page;
mod traces;
mod traces_backup;
mod traces_restore;
mod traces_verbs;
