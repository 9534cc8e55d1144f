//! The Disk trait and its two implementations: the real one and a simulated one for crash tests.
