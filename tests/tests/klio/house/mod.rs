//! The rules of the house, and the harness itself.

mod architecture;
mod harness;
