//! `nacre-bench storage`: a big file, a tree and an archive by virtio-blk and by virtio-fs, next to runc on the same files, and
//! next to QEMU with virtiofsd if there is one. Here are the rounds; `work` is what is measured, `files` on what, `qemu` where beside
//! containers, `measured` what came of it. The program that measures is `nacre-probe`, the same everywhere.

mod files;
mod measured;
mod qemu;
mod work;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::console::Booted;
use super::peers::{Joined, Peer, Surroundings};
use super::probed::{self, Probed, Root};
use super::scenarios::turns;
use super::steady::steady;
use super::{Setting, as_root};
use crate::config::{ByteSize, Config};
use files::Files;
use measured::Measured;
use qemu::Qemu;
use work::{ALL, Answer};

const OURS: &str = "nacre";
const QEMU: &str = "qemu";
/// Where nacre's container has the folder.
const SHARE: &str = "/share";
/// The page cache, dentries and inodes.
const DROP_ALL: &str = "3";

/// Options of `nacre-bench storage`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Rounds; in each, everything is measured once
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// MiB of the file that is read
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Files in the tree, of 100 to 4095 bytes
    #[arg(long, value_name = "N", default_value_t = 10_000, overrides_with = "files", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    files: u64,
    /// Reads of 4 KiB at random places, at each depth
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    reads: u32,
    /// Folder of the host for the files and disks; on tmpfs nothing is ever cold on the host [default: that for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// vCPUs of the VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    vcpus: u8,
    /// Memory of the VMs
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: ByteSize,
    /// The static program that measures [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    probe: Option<PathBuf>,
    /// Also measure this QEMU for x86-64, with --virtiofsd
    #[arg(long, value_name = "PROGRAM", requires = "virtiofsd")]
    qemu: Option<PathBuf>,
    /// virtiofsd for QEMU
    #[arg(long, value_name = "PROGRAM", requires = "qemu")]
    virtiofsd: Option<PathBuf>,
    /// QEMU's initrd: nacre's with the module virtio_pci [default: nacre's, as the configuration names it]
    #[arg(long, value_name = "FILE", requires = "qemu")]
    qemu_initrd: Option<PathBuf>,
}

/// How much there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Sizes {
    /// MiB of the file.
    mib: u64,
    /// Files in the tree.
    files: u64,
}

/// Measures until all rounds are done or something fails; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    as_root()?;
    let mut peers = setting.peers()?;
    let config = Config::load()?;
    let probe = probed::program(options.probe.as_deref())?;
    let patience = Duration::from_secs(setting.patience);
    let sizes = Sizes {
        mib: options.mib,
        files: options.files,
    };
    let within = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    eprintln!("making {} MiB and {} files …", sizes.mib, sizes.files);
    let files = Files::make(&within, &probe, sizes)?;
    let kept = files.beside("config.toml");
    peers[0].config = Some(steady(kept, options.vcpus, options.memory)?);
    let around = Surroundings::over(&files.root(), patience)?;
    let mut measured = Measured::new(&peers, options);
    let outcome =
        sides(options, &config, &peers, &around, &files, patience).and_then(|mut sides| {
            rounds(options, sizes, &mut sides, &mut measured)?;
            let mut lasting = sides.into_iter().filter(|side| !side.left_out);
            lasting.try_for_each(Side::end)
        });
    println!("{}", super::machine());
    println!("{}", measured.tables().trim_end());
    let saved = match &setting.json {
        Some(file) => {
            let mut value = measured.json(options, sizes, &peers, outcome.is_ok());
            value["kernel"] = config.kernel.display().to_string().into();
            super::save(file, value)
        }
        None => Ok(()),
    };
    outcome.and(saved)
}

/// By which way the files come; runc has them by neither, and stands beside both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Blk,
    Fs,
}

impl Way {
    const BOTH: [Way; 2] = [Way::Blk, Way::Fs];

    fn name(self) -> &'static str {
        match self {
            Self::Blk => "virtio-blk",
            Self::Fs => "virtio-fs",
        }
    }
}

/// Where the probe runs.
struct Side<'s> {
    name: &'static str,
    place: Place<'s>,
    /// The folders of the files in it.
    folders: Vec<(&'static [Way], &'static str)>,
    /// It has failed, and may not be ours to mend.
    left_out: bool,
}

enum Place<'s> {
    Container(Probed<'s>),
    Qemu(Qemu),
}

impl Side<'_> {
    fn ask(&mut self, words: &[String]) -> Result<Answer> {
        match &mut self.place {
            Place::Container(container) => container.ask(words),
            Place::Qemu(qemu) => qemu.guest.ask(words),
        }
        .and_then(|line| Answer::parse(&line))
    }

    fn end(self) -> Result<()> {
        match self.place {
            Place::Container(container) => container.end(),
            Place::Qemu(qemu) => qemu.guest.end(),
        }
        .with_context(|| format!("ending {}", self.name))
    }
}

/// Starts all that is measured.
fn sides<'s>(
    options: &Options,
    config: &Config,
    peers: &[Peer],
    around: &'s Surroundings,
    files: &Files,
    patience: Duration,
) -> Result<Vec<Side<'s>>> {
    let mut sides = Vec::new();
    for peer in peers {
        let starting = || format!("starting a container of {}", peer.name);
        let (place, folders): (_, Vec<(&[Way], _)>) = if peer.name == OURS {
            let disk = files.disk("disk-nacre")?;
            let joined = Joined {
                binds: &[(&files.root(), SHARE)],
                netns: None,
            };
            let root: Root<'_> = ("ext4", &disk, &["loop", "rw"]);
            (
                Probed::start(around, peer, &joined, root).with_context(starting)?,
                vec![(&[Way::Blk], "/"), (&[Way::Fs], SHARE)],
            )
        } else {
            let (folder, joined) = (files.root(), Joined::default());
            let root: Root<'_> = ("bind", &folder, &["rbind", "rw"]);
            (
                Probed::start(around, peer, &joined, root).with_context(starting)?,
                vec![(&Way::BOTH, "/")],
            )
        };
        sides.push(Side {
            name: peer.name,
            place: Place::Container(place),
            folders,
            left_out: false,
        });
    }
    if let (Some(program), Some(virtiofsd)) = (&options.qemu, &options.virtiofsd) {
        let what = Booted {
            program,
            kernel: &config.kernel,
            initrd: options.qemu_initrd.as_ref().unwrap_or(&config.initrd),
            vcpus: options.vcpus,
            memory_mib: options.memory.mib(),
        };
        let disk = files.disk("disk-qemu")?;
        sides.push(Side {
            name: QEMU,
            place: Place::Qemu(Qemu::boot(&what, virtiofsd, files, &disk, patience)?),
            folders: vec![(&[Way::Blk], qemu::DISK), (&[Way::Fs], qemu::SHARE)],
            left_out: false,
        });
    }
    Ok(sides)
}

fn rounds(
    options: &Options,
    sizes: Sizes,
    sides: &mut [Side<'_>],
    measured: &mut Measured,
) -> Result<()> {
    let all = options.warm_up + options.rounds;
    // Each way of each side has its turns.
    let places: Vec<(usize, usize)> = (0..sides.len())
        .flat_map(|side| (0..sides[side].folders.len()).map(move |folder| (side, folder)))
        .collect();
    for round in 0..all {
        let counts = round >= options.warm_up;
        let note = if counts { "" } else { ", to warm up" };
        eprintln!("round {} of {all}{note}", round + 1);
        for work in ALL {
            for turn in turns(places.len(), round) {
                let (at, folder) = places[turn];
                let side = &mut sides[at];
                if side.left_out {
                    continue;
                }
                let (ways, folder) = side.folders[folder];
                if work.is_cold() && !drop_caches() {
                    measured.remark("the host's caches cannot be dropped: nothing is cold there");
                }
                let name = side.name;
                let words = work.words(folder, &format!("out-{turn}-{round}"), options.reads);
                let asked = side.ask(&words).and_then(|answer| {
                    let (unit, value) = work.value(&answer, sizes, options.reads)?;
                    Ok((unit, value, answer.remark()))
                });
                let asked = asked.with_context(|| {
                    format!("{name} failed in round {}, {}", round + 1, words.join(" "))
                });
                let (unit, value, remark) = match asked {
                    Ok(asked) => asked,
                    Err(error) if matches!(side.place, Place::Qemu(_)) => {
                        measured.failed(format!("{error:#}"));
                        side.left_out = true;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                if let Some(remark) = remark {
                    measured.remark(&format!("{name}: {remark}"));
                }
                if counts {
                    measured.add(name, ways, work.name(), unit, value);
                }
            }
        }
    }
    Ok(())
}

/// Drops what the host has in its caches; whether it could.
fn drop_caches() -> bool {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", DROP_ALL).is_ok()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    pub(super) fn options(words: &str) -> Result<Options, clap::Error> {
        let words = std::iter::once("storage").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        let all = options("").unwrap();
        assert_eq!((all.mib, all.files, all.rounds), (64, 10_000, 10));
        // xtask has its own count in front of the user's.
        let some =
            options("--files 1000 --mib 1 --files 9 --qemu /q --virtiofsd /v --memory 1G").unwrap();
        assert_eq!((some.memory.mib(), some.vcpus, some.files), (1024, 1, 9));
        for words in [
            "--mib 0",
            "--files 0",
            "--reads 0",
            "--vcpus 0",
            "--qemu /q",
            "--virtiofsd /v",
            "--qemu-initrd /i",
        ] {
            assert!(options(words).is_err(), "{words}");
        }
    }
}
