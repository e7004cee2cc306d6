//! Names of cgroups: the paths and systemd's `slice:prefix:name` of OCI specs, as paths below a hierarchy's root.

use std::path::{Component, Path, PathBuf};

use super::Error;

/// The path below the root that a `cgroupsPath` means. `base` is what a relative path starts from.
///
/// # Errors
/// It is the root itself, or a name in systemd's form that systemd would not take.
pub(super) fn relative(name: &str, base: &Path) -> Result<PathBuf, Error> {
    let wrong = |cause| Error::Name {
        name: name.to_owned(),
        cause,
    };
    let parts: Vec<&str> = name.split(':').collect();
    let path = match parts[..] {
        [slice, prefix, unit] if !name.starts_with('/') => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let mut path = expand(slice).ok_or_else(|| {
                wrong("does not begin with the name of a slice, such as system.slice")
            })?;
            if unit.is_empty() || unit.contains('/') || prefix.contains('/') {
                return Err(wrong(
                    "is in systemd's form and needs a name, without slashes",
                ));
            }
            path.push(match prefix {
                _ if unit.ends_with(".slice") => unit.to_owned(),
                "" => format!("{unit}.scope"),
                prefix => format!("{prefix}-{unit}.scope"),
            });
            path
        }
        _ if name.starts_with('/') => PathBuf::from(name),
        _ => base.join(name),
    };
    let path = plain(&path);
    if path.as_os_str().is_empty() {
        return Err(wrong("is the root of all, which cannot be limited"));
    }
    Ok(path)
}

/// Without a root, and without ever leaving it.
pub(super) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            Component::Prefix(_) | Component::RootDir | Component::CurDir => {}
        }
    }
    plain
}

/// The directory of a slice: `a-b.slice` is in `a.slice`. None if that is no slice's name.
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let mut path = PathBuf::new();
    for (at, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..at]));
    }
    path.push(slice);
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths_below_the_root() {
        let table = [
            ("/default/c1", "default/c1"),
            ("//a/./b/", "a/b"),
            ("/a/../../../b", "b"),
            ("c1", "own/c1"),
            ("../c1", "c1"),
            ("system.slice:nacre:c1", "system.slice/nacre-c1.scope"),
            (":nacre:c1", "system.slice/nacre-c1.scope"),
            ("system.slice::c1", "system.slice/c1.scope"),
            ("-.slice:cri:c1", "cri-c1.scope"),
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope",
            ),
            ("a.slice:x:b.slice", "a.slice/b.slice"),
            ("/with:two:colons", "with:two:colons"),
            ("one:colon", "own/one:colon"),
        ];
        for (name, path) in table {
            let found = relative(name, Path::new("/own")).unwrap();
            assert_eq!(found, Path::new(path), "{name}");
        }
    }

    #[test]
    fn the_root_and_what_systemd_would_not_take_are_refused() {
        for (name, words) in [
            ("/", "root"),
            ("/../..", "root"),
            ("..", "root"),
            ("system:nacre:c1", "slice"),
            ("a--b.slice:nacre:c1", "slice"),
            ("a/b.slice:nacre:c1", "slice"),
            ("system.slice:nacre:", "needs a name"),
            ("system.slice:nacre:a/b", "slashes"),
        ] {
            let error = relative(name, Path::new("/own")).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(name), "{error}");
        }
    }
}
