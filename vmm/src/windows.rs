//! virtio-mmio windows as the machine has them: on the bus, their registers in a memory slot of KVM, their interrupts and
//! notifications connected.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::interrupt::{self, IrqLine, Kick};
use crate::memory;
use crate::memory::layout::{window_address, window_gsi};
use crate::virtio::device::INTERRUPT_USED_RING;
use crate::virtio::mmio::{ACKNOWLEDGE_OFFSET, NOTIFY_OFFSET, Window};
use crate::virtio::registers::RegisterPages;
use crate::vm::Error;

/// A virtio-mmio window on the bus.
pub(crate) struct WindowSlot(Mutex<Window>);

impl WindowSlot {
    pub fn new(window: Window) -> Self {
        Self(Mutex::new(window))
    }

    pub fn lock(&self) -> MutexGuard<'_, Window> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for WindowSlot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

/// What connects a plugged window's device to KVM, from plug to unplug.
pub(crate) struct Wires {
    _kicks: Vec<Kick>,
    _acknowledgements: Kick,
    _line: IrqLine,
}

/// The registers of all windows, which the guest reads without leaving.
pub(crate) struct ShownRegisters {
    pub pages: RegisterPages,
    vm: Arc<VmFd>,
    slot: Option<u32>,
}

impl ShownRegisters {
    /// Shows them by the memory slot `slot`, if KVM knows slots that are read only: a write of them is one of device memory, as if there
    /// were no slot. Where it does not, reads are too.
    pub fn new(vm: &Arc<VmFd>, windows: u8, slot: u32) -> Result<Self, Error> {
        let pages = RegisterPages::new(windows).map_err(Error::Registers)?;
        let mut shown = Self {
            pages,
            vm: Arc::clone(vm),
            slot: None,
        };
        if vm.check_extension(Cap::ReadonlyMem) {
            let (host, bytes) = shown.pages.place();
            shown
                .set(slot, host, bytes)
                .map_err(|source| memory::Error::Registers { slot, source })?;
            shown.slot = Some(slot);
        }
        Ok(shown)
    }

    fn set(&self, slot: u32, host: u64, bytes: u64) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: window_address(0),
            memory_size: bytes,
            userspace_addr: host,
        };
        // SAFETY: the mapping is of that size and stays until the slot is taken away in this value's drop, or for ever.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

impl Drop for ShownRegisters {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && let Err(error) = self.set(slot, self.pages.place().0, 0)
        {
            tracing::warn!(%error, "cannot take the registers' memory slot away");
            // KVM still has it: the mapping stays for as long as the process.
            std::mem::forget(self.pages.clone());
        }
    }
}

/// irqfd and ioeventfds of a window that has a device.
pub(crate) fn lay_wires(
    vm: &Arc<VmFd>,
    index: u8,
    window: &Window,
    swallowed: &Arc<EventFd>,
) -> Result<Wires, interrupt::Error> {
    let line = IrqLine::over(
        Arc::clone(vm),
        window_gsi(index),
        window.interrupt().irqfd(),
    )?;
    let address = window_address(index) + NOTIFY_OFFSET;
    let kicks = (0u32..)
        .zip(window.kicks())
        .map(|(queue, kick)| Kick::new(Arc::clone(vm), address, queue, Arc::clone(kick)))
        .collect::<Result<_, _>>()?;
    let acknowledgements = Kick::new(
        Arc::clone(vm),
        window_address(index) + ACKNOWLEDGE_OFFSET,
        INTERRUPT_USED_RING,
        Arc::clone(swallowed),
    )?;
    Ok(Wires {
        _kicks: kicks,
        _acknowledgements: acknowledgements,
        _line: line,
    })
}
