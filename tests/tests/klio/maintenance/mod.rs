//! Retention, verification and pruning.

pub(crate) mod rules;
