//! From files to a guest that can begin: kernel, initrd, PVH start information and ACPI tables.

pub mod payload;
