//! Retention, verification and pruning.

mod rules;
