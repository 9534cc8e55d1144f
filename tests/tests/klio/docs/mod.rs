//! What the pages say is what happens.

mod decisions;
mod generated;
mod readme;
