//! The positions of one stream, and how much may be sent. Pure.
//!
//! - flushed <= received <= sent; none of them ever moves backwards.
//! - sent - flushed never exceeds the window that the server granted.
//! - P1: [`Flow::flushed`] comes only from the server's acknowledgements.

use klio_pg::Lsn;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    start: Lsn,
    sent: Lsn,
    received: Lsn,
    flushed: Lsn,
    /// Durable on the server before this stream began; ZERO when nothing was.
    durable: Lsn,
    window: u64,
}

/// An acknowledgement that contradicts what was sent or acknowledged before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "check acknowledgement: expected flushed {min} <= flushed <= received <= sent {max}, found flushed {flushed}, received {received}"
)]
pub struct AckError {
    min: Lsn,
    max: Lsn,
    flushed: Lsn,
    received: Lsn,
}

impl Flow {
    /// A stream that begins at `start`; `durable` is the position that was acknowledged before it.
    pub fn new(start: Lsn, durable: Option<Lsn>, window: u64) -> Self {
        let durable = durable.unwrap_or(Lsn::ZERO);
        Self { start, sent: start, received: start, flushed: start, durable, window }
    }

    /// The next byte to send.
    pub const fn sent(&self) -> Lsn {
        self.sent
    }

    /// How many bytes may be sent now.
    pub const fn room(&self) -> u64 {
        self.window.saturating_sub(self.sent.bytes_since(self.flushed))
    }

    /// Records that `bytes` were sent; they must not exceed [`Flow::room`].
    pub fn on_sent(&mut self, bytes: u64) {
        debug_assert!(bytes <= self.room(), "window exceeded");
        self.sent = self.sent.advance(bytes);
    }

    /// Records an acknowledgement of the server.
    ///
    /// # Errors
    /// Positions that move backwards or lie beyond what was sent.
    pub fn on_ack(&mut self, received: Lsn, flushed: Lsn) -> Result<(), AckError> {
        let good = self.flushed <= flushed && flushed <= received && received <= self.sent;
        if !good {
            return Err(AckError { min: self.flushed, max: self.sent, flushed, received });
        }
        self.received = self.received.max(received);
        self.flushed = flushed;
        Ok(())
    }

    /// The received and flushed positions to report to PostgreSQL. Both are ZERO, which PostgreSQL ignores, until the
    /// server has acknowledged a byte of this stream or of an earlier one.
    pub fn report(&self) -> (Lsn, Lsn) {
        let said = |position: Lsn| if position > self.start { position } else { self.durable };
        (said(self.received), said(self.flushed))
    }

    /// The position up to which this stream's acknowledgements say that WAL is durable.
    pub const fn flushed(&self) -> Lsn {
        self.flushed
    }

    /// Whether everything sent is durable.
    pub fn is_settled(&self) -> bool {
        self.flushed == self.sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_reported_before_the_server_acknowledged_something() {
        let flow = Flow::new(Lsn::new(100), None, 50);
        assert_eq!(flow.report(), (Lsn::ZERO, Lsn::ZERO));
    }

    /// A backend may wait for a position whose acknowledgement was lost with the last connection.
    #[test]
    fn what_was_durable_before_is_reported_at_once() {
        let flow = Flow::new(Lsn::new(100), Some(Lsn::new(100)), 50);
        assert_eq!(flow.report(), (Lsn::new(100), Lsn::new(100)));
    }

    #[test]
    fn what_lies_behind_a_gap_is_not_reported_as_flushed() {
        let flow = Flow::new(Lsn::new(500), Some(Lsn::new(100)), 50);
        assert_eq!(flow.report().1, Lsn::new(100));
    }

    #[test]
    fn an_acknowledgement_beyond_what_was_sent_is_refused() {
        let mut flow = Flow::new(Lsn::new(100), None, 50);
        flow.on_sent(10);
        assert!(flow.on_ack(Lsn::new(111), Lsn::new(111)).is_err());
        assert!(flow.on_ack(Lsn::new(105), Lsn::new(106)).is_err());
        assert!(flow.on_ack(Lsn::new(110), Lsn::new(105)).is_ok());
        assert!(flow.on_ack(Lsn::new(110), Lsn::new(104)).is_err());
    }

    proptest! {
        #[test]
        fn the_window_holds_and_flushed_only_grows(
            window in 1u64..1000,
            steps in prop::collection::vec((any::<bool>(), 0u64..500, 0u64..500), 1..100),
        ) {
            let mut flow = Flow::new(Lsn::new(1 << 20), None, window);
            for (send, a, b) in steps {
                let before = flow;
                if send {
                    flow.on_sent(a.min(flow.room()));
                } else {
                    let _ = flow.on_ack(flow.flushed.advance(a), flow.flushed.advance(b));
                }
                prop_assert!(flow.sent.bytes_since(flow.flushed) <= window);
                prop_assert!(flow.flushed >= before.flushed && flow.flushed <= flow.received);
                prop_assert!(flow.received <= flow.sent);
                prop_assert!(flow.report().1 <= flow.sent);
            }
        }
    }
}
