//! `--disk PATH[:ro]`.

use std::path::PathBuf;

use crate::sandbox::DiskConfig;

/// A disk on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskArg {
    pub path: PathBuf,
    pub read_only: bool,
}

impl std::str::FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, true),
            Some((path, "rw")) => (path, false),
            _ => (text, false),
        };
        if path.is_empty() {
            return Err("a disk needs a path: PATH, PATH:ro or PATH:rw".to_owned());
        }
        Ok(Self {
            path: path.into(),
            read_only,
        })
    }
}

impl DiskArg {
    /// The disk for the VM; `index` makes its serial.
    pub(super) fn config(&self, index: usize) -> DiskConfig {
        DiskConfig::file(&self.path, self.read_only, format!("disk{index}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suffix_says_the_access_and_other_colons_belong_to_the_path() {
        let parse = |text: &str| text.parse::<DiskArg>();
        let disk = |path: &str, read_only| {
            Ok(DiskArg {
                path: path.into(),
                read_only,
            })
        };
        assert_eq!(parse("/d.img"), disk("/d.img", false));
        assert_eq!(parse("/d.img:ro"), disk("/d.img", true));
        assert_eq!(parse("/d.img:rw"), disk("/d.img", false));
        assert_eq!(parse("/a:b"), disk("/a:b", false));
        parse("").unwrap_err();
        parse(":ro").unwrap_err();
    }
}
