//! Where a connection is in its life, what may happen to it, and where that
//! leads: one table, with no data and no effects.

/// Why a connection is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The guest said that it is through, or had nothing more to say.
    Finished,
    /// The guest has no listener on the port.
    Refused,
    /// The guest reset it.
    Reset,
    /// The guest broke the protocol, and we reset it.
    Violation,
    /// The VM has ended, or the guest's driver has reset the device.
    Ended,
}

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The host connects; OP_REQUEST is not sent yet.
    Requesting,
    /// OP_REQUEST is sent, no answer yet.
    Requested,
    /// The guest has connected; OP_RESPONSE is not sent yet.
    Accepting,
    /// Bytes flow. Half-closes are kept beside, by direction.
    Established,
    /// Our SHUTDOWN of both directions is sent; the guest's RST is to come.
    Closing,
    /// Over. What was received before may still be read.
    Closed(Cause),
}

/// What may happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// OP_REQUEST went to the guest.
    RequestSent,
    /// OP_RESPONSE went to the guest.
    ResponseSent,
    /// OP_SHUTDOWN of both directions went to the guest.
    CloseSent,
    /// The guest sent OP_REQUEST for a port pair that is in use.
    GotRequest,
    /// The guest sent OP_RESPONSE.
    GotResponse,
    /// The guest sent OP_RW.
    GotData,
    /// The guest sent OP_CREDIT_UPDATE or OP_CREDIT_REQUEST.
    GotCredit,
    /// The guest sent OP_SHUTDOWN, and one direction is still open.
    GotShutdown,
    /// The guest sent OP_SHUTDOWN, and both directions are shut down now.
    GotFullShutdown,
    /// The guest sent OP_RST.
    GotReset,
    /// Something from outside ended it.
    Stop(Cause),
}

/// A step that its phase does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A connection that is {phase:?} cannot take {step:?}")]
pub struct Unexpected {
    /// Where the connection was.
    pub phase: Phase,
    /// What happened.
    pub step: Step,
}

impl Phase {
    /// The phase that follows.
    ///
    /// # Errors
    /// [`Unexpected`] when the guest may not do that now.
    pub fn after(self, step: Step) -> Result<Self, Unexpected> {
        use Phase::{Accepting, Closed, Closing, Established, Requested, Requesting};
        use Step::{
            CloseSent, GotCredit, GotData, GotFullShutdown, GotReset, GotResponse, GotShutdown,
            RequestSent, ResponseSent, Stop,
        };
        Ok(match (self, step) {
            (Closed(cause), Stop(_)) => Closed(cause),
            (_, Stop(cause)) => Closed(cause),
            (Requesting, RequestSent) => Requested,
            (Requested, GotResponse) => Established,
            (Requesting | Requested, GotReset) => Closed(Cause::Refused),
            (Accepting, ResponseSent) => Established,
            (Established, CloseSent) => Closing,
            (Established | Closing, GotData) => self,
            (Accepting | Established | Closing, GotCredit | GotShutdown) => self,
            (Accepting | Established, GotReset) => Closed(Cause::Reset),
            (Closing, GotReset) => Closed(Cause::Finished),
            (Accepting | Established | Closing, GotFullShutdown) => Closed(Cause::Finished),
            (phase, step) => return Err(Unexpected { phase, step }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_phase_and_step_is_as_the_table_says() {
        use Phase::{Accepting, Closed, Closing, Established, Requested, Requesting};
        use Step::{
            CloseSent, GotCredit, GotData, GotFullShutdown, GotRequest, GotReset, GotResponse,
            GotShutdown, RequestSent, ResponseSent, Stop,
        };
        let finished = Closed(Cause::Finished);
        let refused = Closed(Cause::Refused);
        let reset = Closed(Cause::Reset);
        let ended = Closed(Cause::Ended);
        let phases = [
            Requesting,
            Requested,
            Accepting,
            Established,
            Closing,
            finished,
            reset,
        ];
        type Row = (Step, [Option<Phase>; 7]);
        let table: [Row; 11] = [
            (
                RequestSent,
                [Some(Requested), None, None, None, None, None, None],
            ),
            (
                ResponseSent,
                [None, None, Some(Established), None, None, None, None],
            ),
            (
                CloseSent,
                [None, None, None, Some(Closing), None, None, None],
            ),
            (GotRequest, [None; 7]),
            (
                GotResponse,
                [None, Some(Established), None, None, None, None, None],
            ),
            (
                GotData,
                [
                    None,
                    None,
                    None,
                    Some(Established),
                    Some(Closing),
                    None,
                    None,
                ],
            ),
            (
                GotCredit,
                [
                    None,
                    None,
                    Some(Accepting),
                    Some(Established),
                    Some(Closing),
                    None,
                    None,
                ],
            ),
            (
                GotShutdown,
                [
                    None,
                    None,
                    Some(Accepting),
                    Some(Established),
                    Some(Closing),
                    None,
                    None,
                ],
            ),
            (
                GotFullShutdown,
                [
                    None,
                    None,
                    Some(finished),
                    Some(finished),
                    Some(finished),
                    None,
                    None,
                ],
            ),
            (
                GotReset,
                [
                    Some(refused),
                    Some(refused),
                    Some(reset),
                    Some(reset),
                    Some(finished),
                    None,
                    None,
                ],
            ),
            (
                Stop(Cause::Ended),
                [
                    Some(ended),
                    Some(ended),
                    Some(ended),
                    Some(ended),
                    Some(ended),
                    Some(finished),
                    Some(reset),
                ],
            ),
        ];
        for (step, row) in table {
            for (phase, expected) in phases.into_iter().zip(row) {
                let after = phase.after(step);
                assert_eq!(after.ok(), expected, "{phase:?} and {step:?}");
                if let Err(error) = after {
                    assert_eq!(error, Unexpected { phase, step });
                }
            }
        }
    }
}
