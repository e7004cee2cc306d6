//! The kinds of values in the configuration: how they are written, which are
//! allowed, and how they are printed. Whatever else is found is an error that
//! says what would be right.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nacre_vmm::config::{MAXIMUM_MEMORY_MIB, MAXIMUM_VCPUS, MINIMUM_MEMORY_MIB};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserializer, Serialize, Serializer};

use crate::sandbox::annotations::Annotation;

/// Longest state directory in bytes: below it a control socket has to fit in the 107 bytes of a socket's path.
pub(super) const LONGEST_STATE_DIR: usize =
    107 - "/vms/".len() - 33 - "/".len() - crate::control::SOCKET.len();
/// Most bytes of kernel words: the kernel takes 2047, and the default ones need some.
const LONGEST_CMDLINE: usize = 1024;
/// A year is for ever; more would overflow clocks.
const LONGEST_DURATION_MS: u64 = 31_536_000_000;
/// Shortest time between two readings: each is a call into the guest.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);
/// What memory is plugged in, in MiB.
const PLUG_UNIT_MIB: u64 = 2;

/// A size in bytes, written as a number with an optional K, M, G or T (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// A size of so many MiB.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// In MiB, rounded up.
    pub const fn mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is not a size: write a number with K, M, G or T, such as 512M");
        let trimmed = text.trim();
        let digits = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let unit = unit.trim().to_ascii_uppercase();
        let unit = unit
            .strip_suffix("IB")
            .or(unit.strip_suffix('B'))
            .unwrap_or(&unit);
        let shift = match unit {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A duration as a number with `ms`, `s` or `m`, more than zero and at most a year.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!(
            "{text:?} is not a duration: write a number above 0 with ms, s or m, such as 10s, and at most 525600m"
        )
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let millis = match unit.trim() {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    match millis {
        Some(millis @ 1..=LONGEST_DURATION_MS) => Ok(Duration::from_millis(millis)),
        _ => Err(wrong()),
    }
}

/// As [`parse_duration`], and zero.
fn parse_pause(text: &str) -> Result<Duration, String> {
    match text {
        "0" | "0ms" | "0s" | "0m" => Ok(Duration::ZERO),
        text => parse_duration(text).map_err(|_| {
            format!(
                "{text:?} is not a duration: write 0, or a number with ms, s or m, such as 10s, and at most 525600m"
            )
        }),
    }
}

fn between(
    text: &str,
    least: ByteSize,
    most: ByteSize,
    what: &'static str,
) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    if size < least || size > most {
        return Err(format!("{text:?} is out of range: {what}"));
    }
    Ok(size)
}

/// Memory that a VM can have.
pub(crate) fn parse_memory(text: &str) -> Result<ByteSize, String> {
    let least = ByteSize::from_mib(MINIMUM_MEMORY_MIB);
    between(
        text,
        least,
        ByteSize::from_mib(MAXIMUM_MEMORY_MIB),
        Memory::ALLOWED,
    )
}

/// How many vCPUs a VM can have.
pub(crate) fn parse_vcpus(text: &str) -> Result<u8, String> {
    match text.parse::<u8>() {
        Ok(count @ 1..=MAXIMUM_VCPUS) => Ok(count),
        _ => Err(format!("{text:?} vCPUs are not possible: {VCPUS_ALLOWED}")),
    }
}

/// A file of the host.
pub(crate) fn parse_file(text: &str) -> Result<PathBuf, String> {
    if !text.starts_with('/') || text.contains('\0') {
        return Err(format!("{text:?} does not begin with /: {}", File::ALLOWED));
    }
    Ok(text.into())
}

/// Words for the kernel.
pub(crate) fn parse_cmdline(text: &str) -> Result<String, String> {
    if text.len() > LONGEST_CMDLINE || text.chars().any(char::is_control) {
        return Err(format!(
            "{} bytes that are too many or hold a control character: {}",
            text.len(),
            Words::ALLOWED
        ));
    }
    Ok(text.to_owned())
}

/// A kind of value that is written as text.
trait Kind {
    type Value;
    /// What may be written, for errors.
    const ALLOWED: &'static str;
    fn parse(text: &str) -> Result<Self::Value, String>;
}

/// Reads a [`Kind`] from a TOML string.
struct Text<K>(std::marker::PhantomData<K>);

impl<K: Kind> Visitor<'_> for Text<K> {
    type Value = K::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(K::ALLOWED)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<K::Value, E> {
        K::parse(text).map_err(E::custom)
    }
}

fn text<'de, K: Kind, D: Deserializer<'de>>(deserializer: D) -> Result<K::Value, D::Error> {
    deserializer.deserialize_str(Text::<K>(std::marker::PhantomData))
}

macro_rules! kinds {
    ($($kind:ident, $reader:ident: $value:ty = $parse:expr, $allowed:literal;)+) => { $(
        struct $kind;

        impl Kind for $kind {
            type Value = $value;
            const ALLOWED: &'static str = $allowed;
            fn parse(text: &str) -> Result<$value, String> {
                $parse(text)
            }
        }

        pub(super) fn $reader<'de, D: Deserializer<'de>>(deserializer: D) -> Result<$value, D::Error> {
            text::<$kind, D>(deserializer)
        }
    )+ };
}

kinds! {
    Span, read_duration: Duration = parse_duration,
        "a string with a duration: a number above 0 with ms, s or m, such as 10s";
    Memory, memory: ByteSize = parse_memory,
        "a string with a size from 96M to 1023G, such as 512M";
    GuestMemory, guest_memory: ByteSize = |text: &str| {
        between(text, ByteSize(0), ByteSize::from_mib(MAXIMUM_MEMORY_MIB), GuestMemory::ALLOWED)
    }, "a string with a size up to 1023G, such as 128M";
    MostMemory, most_memory: ByteSize = |text: &str| match text.parse() {
        Ok(ByteSize(0)) => Ok(ByteSize(0)),
        _ => parse_memory(text).map_err(|error| format!("{error}, or 0")),
    }, "a string with 0 or a size from 96M to 1023G, such as 4G";
    Step, step: ByteSize = |text: &str| {
        let size = between(text, ByteSize(0), ByteSize::from_mib(MAXIMUM_MEMORY_MIB), Step::ALLOWED)?;
        match size.0.is_multiple_of(PLUG_UNIT_MIB << 20) {
            true => Ok(size),
            false => Err(format!("{text:?} is not possible: {}", Step::ALLOWED)),
        }
    }, "a string with a multiple of 2M up to 1023G, such as 128M";
    Pause, read_pause: Duration = parse_pause,
        "a string with a duration: 0, or a number with ms, s or m, such as 10s";
    Interval, read_interval: Duration = |text: &str| match parse_pause(text) {
        Ok(interval) if interval.is_zero() || interval >= SHORTEST_INTERVAL => Ok(interval),
        _ => Err(format!("{text:?} is not possible: {}", Interval::ALLOWED)),
    }, "a string with 0 or a duration from 100ms to 525600m, such as 10s";
    File, file: PathBuf = parse_file,
        "a string with an absolute path";
    StateDir, state_dir: PathBuf = |text: &str| match parse_file(text) {
        Ok(path) if text.len() <= LONGEST_STATE_DIR => Ok(path),
        _ => Err(format!("{text:?} is not possible: {}", StateDir::ALLOWED)),
    }, "a string with an absolute path of at most 56 bytes";
    FileOrNone, file_or_none: PathBuf = |text: &str| match text {
        "" => Ok(PathBuf::new()),
        text => parse_file(text).map_err(|_| format!("{text:?} is not possible: {}", FileOrNone::ALLOWED)),
    }, "a string with an absolute path, or an empty one";
    Words, cmdline: String = parse_cmdline,
        "a string of at most 1024 bytes on one line";
}

const VCPUS_ALLOWED: &str = "a whole number from 1 to 254";

const WORKERS_ALLOWED: &str = "a whole number from 1 to 64";

pub(super) fn workers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    deserializer.deserialize_i64(Count {
        least: 1,
        most: 64,
        allowed: WORKERS_ALLOWED,
    })
}

pub(super) fn vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    deserializer.deserialize_i64(Count {
        least: 1,
        most: MAXIMUM_VCPUS,
        allowed: VCPUS_ALLOWED,
    })
}

pub(super) fn most_vcpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    deserializer.deserialize_i64(Count {
        least: 0,
        most: MAXIMUM_VCPUS,
        allowed: "a whole number from 0 to 254",
    })
}

pub(super) fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    deserializer.deserialize_i64(Count {
        least: 0,
        most: 100,
        allowed: "a whole number of percent from 0 to 100",
    })
}

pub(super) fn readings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    deserializer.deserialize_i64(Count {
        least: 0,
        most: u8::MAX,
        allowed: "a whole number from 0 to 255",
    })
}

/// Reads a whole number in a range.
struct Count {
    least: u8,
    most: u8,
    allowed: &'static str,
}

impl Visitor<'_> for Count {
    type Value = u8;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.allowed)
    }

    fn visit_i64<E: serde::de::Error>(self, count: i64) -> Result<u8, E> {
        u8::try_from(count)
            .ok()
            .filter(|count| (self.least..=self.most).contains(count))
            .ok_or_else(|| E::custom(format!("{count} is not possible: {}", self.allowed)))
    }
}

/// Names of annotations.
pub(super) fn annotations<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Annotation>, D::Error> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Vec<Annotation>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of annotations' names, such as [\"io.nacre.vcpus\"]")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<Vec<Annotation>, A::Error> {
            let mut annotations = Vec::new();
            while let Some(name) = names.next_element::<String>()? {
                annotations.push(name.parse().map_err(A::Error::custom)?);
            }
            Ok(annotations)
        }
    }
    deserializer.deserialize_seq(Names)
}

/// Directories.
pub(super) fn directories<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<PathBuf>, D::Error> {
    struct Paths;
    impl<'de> Visitor<'de> for Paths {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of absolute paths, such as [\"/opt/cni/bin\"]")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut paths: A) -> Result<Vec<PathBuf>, A::Error> {
            let mut directories = Vec::new();
            while let Some(path) = paths.next_element::<String>()? {
                directories.push(parse_file(&path).map_err(A::Error::custom)?);
            }
            Ok(directories)
        }
    }
    deserializer.deserialize_seq(Paths)
}

macro_rules! durations {
    ($($(#[$doc:meta])* $name:ident = $read:ident;)+) => { $(
        $(#[$doc])*
        pub(super) mod $name {
            use super::*;

            pub(crate) fn serialize<S: Serializer>(
                duration: &Duration,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&show_duration(*duration))
            }

            pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<Duration, D::Error> {
                $read(deserializer)
            }
        }
    )+ };
}

durations! {
    /// For `#[serde(with)]`: a time limit, never zero.
    duration = read_duration;
    /// For `#[serde(with)]`: a time to leave something alone, which may be zero.
    pause = read_pause;
    /// For `#[serde(with)]`: how often something is done; zero: not at all.
    interval = read_interval;
}

/// As it would be written.
pub(crate) fn show_duration(duration: Duration) -> String {
    match duration.as_millis() {
        millis if millis % 1000 == 0 => format!("{}s", millis / 1000),
        millis => format!("{millis}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("1g", 1 << 30),
            ("7", 7),
            ("2 GiB", 2 << 30),
            ("4KB", 4096),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
        for text in ["", "M", "-1M", "1.5G", "99999999999T"] {
            text.parse::<ByteSize>().unwrap_err();
        }
        assert_eq!(ByteSize::from_mib(512).to_string(), "512M");
        assert_eq!(ByteSize(3).to_string(), "3");
    }

    #[test]
    fn the_texts_about_ranges_hold_the_ranges() {
        assert_eq!(ByteSize::from_mib(MINIMUM_MEMORY_MIB).to_string(), "96M");
        assert_eq!(ByteSize::from_mib(MAXIMUM_MEMORY_MIB).to_string(), "1023G");
        assert_eq!(MAXIMUM_VCPUS, 254);
        assert_eq!(show_duration(SHORTEST_INTERVAL), "100ms");
        assert_eq!(ByteSize::from_mib(PLUG_UNIT_MIB).to_string(), "2M");
        assert_eq!(LONGEST_STATE_DIR, 56);
        assert_eq!(LONGEST_CMDLINE, 1024);
        assert_eq!(
            parse_duration("525600m").unwrap().as_millis(),
            u128::from(LONGEST_DURATION_MS)
        );
        parse_duration("525601m").unwrap_err();
    }

    #[test]
    fn durations_are_shown_as_they_are_read() {
        for text in ["500ms", "30s", "90s"] {
            assert_eq!(show_duration(parse_duration(text).unwrap()), text);
        }
    }
}
