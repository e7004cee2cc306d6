//! The templates in mounts of type `format/…`: `{{ mount 0 }}` and its kin, which name what earlier
//! mounts of the list became.

use super::Error;

/// What a template may name of the mounts before it.
pub(super) trait Earlier {
    /// How many there are.
    fn count(&self) -> usize;
    /// Where mount `index` is.
    fn mount_point(&self, index: usize) -> String;
    /// What it was mounted from.
    fn source(&self, index: usize) -> Result<String, String>;
}

/// Whether a text is one, or has one in it.
pub(super) fn is_template(text: &str) -> bool {
    text.contains("{{")
}

/// Fills in a text: `{{ mount N }}` and `{{ target N }}` are where mount N is, `{{ source N }}` what it was mounted
/// from, `{{ overlay A B }}` where the mounts from A to B are, joined by colons; A may be after B.
pub(super) fn fill(text: &str, earlier: &impl Earlier) -> Result<String, Error> {
    let wrong = |why: String| Error::Template {
        text: text.to_owned(),
        why,
    };
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let (inside, after) = after
            .split_once("}}")
            .ok_or_else(|| wrong("it has no }}".to_owned()))?;
        filled.push_str(before);
        filled.push_str(&call(inside, earlier).map_err(wrong)?);
        rest = after;
    }
    filled.push_str(rest);
    Ok(filled)
}

fn call(inside: &str, earlier: &impl Earlier) -> Result<String, String> {
    // Dashes beside the braces trim blanks, of which there are none that matter.
    let words: Vec<&str> = inside.trim_matches('-').split_ascii_whitespace().collect();
    let index = |word: &str| {
        let count = earlier.count();
        let index: usize = word
            .parse()
            .map_err(|_| format!("{word:?} is not the number of a mount"))?;
        match index < count {
            true => Ok(index),
            false => Err(format!("there is no mount {index}; {count} come before it")),
        }
    };
    match words[..] {
        ["mount" | "target", of] => Ok(earlier.mount_point(index(of)?)),
        ["source", of] => earlier.source(index(of)?),
        ["overlay", from, to] => {
            let (from, to) = (index(from)?, index(to)?);
            let mut all: Vec<String> = (from.min(to)..=from.max(to))
                .map(|index| earlier.mount_point(index))
                .collect();
            if from > to {
                all.reverse();
            }
            Ok(all.join(":"))
        }
        _ => Err(format!(
            "{:?} is none of mount N, target N, source N, overlay A B",
            inside.trim()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Three;

    impl Earlier for Three {
        fn count(&self) -> usize {
            3
        }

        fn mount_point(&self, index: usize) -> String {
            format!("m/{index}")
        }

        fn source(&self, index: usize) -> Result<String, String> {
            Ok(format!("/dev/vd{index}"))
        }
    }

    #[test]
    fn calls_are_filled_in_wherever_they_are() {
        for (text, filled) in [
            ("upperdir={{ mount 2 }}/upper", "upperdir=m/2/upper"),
            ("lowerdir={{ overlay 0 2 }}", "lowerdir=m/0:m/1:m/2"),
            ("lowerdir={{overlay 2 0}}:x", "lowerdir=m/2:m/1:m/0:x"),
            ("{{- overlay 1 1 -}}", "m/1"),
            ("{{ source 1 }}={{ target 0 }}", "/dev/vd1=m/0"),
            ("plain } text {", "plain } text {"),
        ] {
            assert_eq!(fill(text, &Three).unwrap(), filled, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_filled_in_is_named() {
        for (text, why) in [
            ("{{ mount 3 }}", "no mount 3"),
            ("{{ overlay 0 9 }}", "no mount 9"),
            ("{{ mount -1 }}", "\"-1\""),
            ("{{ mount }}", "none of mount"),
            ("{{ exec \"rm\" }}", "none of mount"),
            ("{{ mount 0", "no }}"),
            ("{{}}", "none of mount"),
        ] {
            let error = fill(text, &Three).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
