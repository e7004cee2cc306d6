//! A change of size, as messages and back.

use super::{Changed, Wanted, proto};
use crate::sandbox::resize::{Resized, Step};

pub(super) fn request(wanted: Wanted) -> proto::ResizeRequest {
    let mut request = proto::ResizeRequest::new();
    request.vcpus = wanted.vcpus.map_or(0, u32::from);
    request.memory_mib = wanted.memory_mib.unwrap_or(0);
    request
}

pub(super) fn wanted(request: &proto::ResizeRequest) -> Result<Wanted, String> {
    let most = nacre_vmm::config::MAXIMUM_VCPUS;
    let possible = u8::try_from(request.vcpus).ok();
    let vcpus = possible
        .filter(|vcpus| *vcpus <= most)
        .ok_or_else(|| format!("{} vCPUs: at most {most} are possible", request.vcpus))?;
    Ok(Wanted {
        vcpus: (vcpus > 0).then_some(vcpus),
        memory_mib: (request.memory_mib > 0).then_some(request.memory_mib),
    })
}

impl From<Changed> for proto::ResizeResponse {
    fn from(from: Changed) -> Self {
        let mut to = Self::new();
        to.vcpus = from.vcpus.map(Into::into).into();
        to.memory = from.memory.map(Into::into).into();
        to
    }
}

impl From<proto::ResizeResponse> for Changed {
    fn from(from: proto::ResizeResponse) -> Self {
        Self {
            vcpus: from.vcpus.into_option().map(Into::into),
            memory: from.memory.into_option().map(Into::into),
        }
    }
}

impl From<Resized> for proto::Resized {
    fn from(from: Resized) -> Self {
        let step = |from: Step| {
            let mut to = proto::ResizeStep::new();
            to.what = from.what;
            to.host_us = from.host_us;
            to.noticed_us = from.noticed_us;
            to.online_us = from.online_us;
            to.total_us = from.total_us;
            to
        };
        let mut to = Self::new();
        to.before = from.before;
        to.now = from.now;
        to.steps = from.steps.into_iter().map(step).collect();
        to
    }
}

impl From<proto::Resized> for Resized {
    fn from(from: proto::Resized) -> Self {
        let step = |from: proto::ResizeStep| Step {
            what: from.what,
            host_us: from.host_us,
            noticed_us: from.noticed_us,
            online_us: from.online_us,
            total_us: from.total_us,
        };
        Self {
            before: from.before,
            now: from.now,
            steps: from.steps.into_iter().map(step).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_survives_the_wire_form_up_to_the_machines_limit() {
        for (vcpus, memory_mib) in [
            (None, None),
            (Some(1), None),
            (Some(254), Some(1)),
            (None, Some(u64::MAX)),
        ] {
            let sent = Wanted { vcpus, memory_mib };
            assert_eq!(wanted(&request(sent)), Ok(sent));
        }
        for vcpus in [255, 256, 257, u32::MAX] {
            let mut request = proto::ResizeRequest::new();
            request.vcpus = vcpus;
            let refused = format!("{vcpus} vCPUs: at most 254 are possible");
            assert_eq!(wanted(&request), Err(refused));
        }
    }
}
