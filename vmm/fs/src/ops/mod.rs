//! The operations, by what they are about.

mod attributes;
mod directories;
mod files;
mod names;
mod xattrs;
