//! Wires between the guest and eventfds: interrupts that go in (irqfd) and kicks that come out
//! (ioeventfd). Each is owned by a value whose drop takes the wire away again.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A wire could not be laid.
#[derive(Debug, Error)]
pub enum Error {
    /// No eventfd.
    #[error("cannot make an eventfd for interrupt line {gsi}")]
    EventFd {
        /// The line (GSI).
        gsi: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// KVM_IRQFD failed.
    #[error("cannot connect an eventfd to interrupt line {gsi}")]
    Irqfd {
        /// The line (GSI).
        gsi: u32,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM_IOEVENTFD failed.
    #[error("cannot connect an eventfd to writes of {value} at {address:#x}")]
    Ioeventfd {
        /// Guest-physical address.
        address: u64,
        /// The value that is matched.
        value: u32,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// An edge interrupt line: writing to its eventfd raises it in the guest.
pub struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
    fd: EventFd,
}

impl IrqLine {
    /// Connects the interrupt line `gsi` to a fresh eventfd; see [`Self::trigger`].
    ///
    /// # Errors
    ///
    /// If there is no eventfd or KVM refuses.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Result<Self, Error> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| Error::EventFd { gsi, source })?;
        Self::connect(vm, gsi, fd)
    }

    /// Connects the interrupt line `gsi` to another descriptor of the eventfd `fd`.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left or KVM refuses.
    pub fn over(vm: Arc<VmFd>, gsi: u32, fd: &EventFd) -> Result<Self, Error> {
        let fd = fd
            .try_clone()
            .map_err(|source| Error::EventFd { gsi, source })?;
        Self::connect(vm, gsi, fd)
    }

    fn connect(vm: Arc<VmFd>, gsi: u32, fd: EventFd) -> Result<Self, Error> {
        vm.register_irqfd(&fd, gsi)
            .map_err(|source| Error::Irqfd { gsi, source })?;
        Ok(Self { vm, gsi, fd })
    }

    /// Another descriptor of the line's eventfd.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn trigger(&self) -> Result<EventFd, Error> {
        self.fd.try_clone().map_err(|source| Error::EventFd {
            gsi: self.gsi,
            source,
        })
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        if let Err(error) = self.vm.unregister_irqfd(&self.fd, self.gsi) {
            tracing::warn!(gsi = self.gsi, %error, "cannot disconnect an interrupt line");
        }
    }
}

/// A 32-bit write of one value to one MMIO address that ends in KVM as an eventfd's count.
pub struct Kick {
    vm: Arc<VmFd>,
    address: u64,
    value: u32,
    fd: Arc<EventFd>,
}

impl Kick {
    /// Connects writes of `value` at guest-physical `address` to `fd`.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn new(vm: Arc<VmFd>, address: u64, value: u32, fd: Arc<EventFd>) -> Result<Self, Error> {
        vm.register_ioevent(&fd, &IoEventAddress::Mmio(address), value)
            .map_err(|source| Error::Ioeventfd {
                address,
                value,
                source,
            })?;
        Ok(Self {
            vm,
            address,
            value,
            fd,
        })
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        let address = IoEventAddress::Mmio(self.address);
        if let Err(error) = self.vm.unregister_ioevent(&self.fd, &address, self.value) {
            tracing::warn!(address = self.address, value = self.value, %error, "cannot disconnect a queue notification");
        }
    }
}
