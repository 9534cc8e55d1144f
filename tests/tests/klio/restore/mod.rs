//! Restores and drills: whole, to a target, onto standbys, of copies, by hand, and the restore proof.

mod copies;
mod debian;
mod disaster;
mod end;
mod mapped;
mod proof;
mod rig;
mod standby;
mod target;
mod whole;
