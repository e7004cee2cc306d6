//! nacre: a containerd shim that is its own virtual machine monitor.
