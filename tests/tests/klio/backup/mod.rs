//! Base backups: taking them, storing them, faults on the way, encryption and hostile clients.

mod base;
mod base_faults;
mod encryption;
mod hostile;
mod quota;
mod taken;
