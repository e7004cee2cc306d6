//! `nacre-bench storage`: a big file, a tree and an archive by virtio-blk and by virtio-fs, next to runc on the same files, and
//! next to QEMU with virtiofsd if there is one. Here are the rounds; `work` is what is measured, `files` on what, `qemu` where beside
//! containers, `options` what it is told. The program that measures is `nacre-probe`, the same everywhere.

mod files;
mod options;
mod qemu;
mod work;

use std::time::Duration;

use anyhow::{Context, Result};

use super::console::Booted;
use super::guest::GuestKernel;
use super::peers::{Joined, Peer, Surroundings};
use super::probed::{self, Probed, Root};
use super::run::{Round, Run, turns};
use super::steady::steady;
use super::{Setting, as_root, interrupt};
use crate::config::Config;
use files::Files;
pub(super) use options::Options;
use qemu::Qemu;
use work::{ALL, Answer, Work};

const OURS: &str = "nacre";
const QEMU: &str = "qemu";
/// Where nacre's container has the folder.
const SHARE: &str = "/share";
/// The page cache, dentries and inodes.
const DROP_ALL: &str = "3";

/// How much there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    /// MiB of the file.
    mib: u64,
    /// Files in the tree.
    files: u64,
}

/// Measures until all rounds are done, something fails or a signal comes; what there is then is shown and written.
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
    let mut run = Run::new("storage", options.settings(&within), setting);
    run.document.tables.extend(options.tables(&peers));
    run.document.guest_kernel = Some(GuestKernel::of(&config.kernel, Some(&config.initrd)));
    run.peers(&peers);
    for (name, program) in [(QEMU, &options.qemu), ("virtiofsd", &options.virtiofsd)] {
        if let Some(program) = program {
            run.document.program(name, program);
        }
    }
    let outcome =
        sides(options, &config, &peers, &around, &files, patience).and_then(|mut sides| {
            measure(options, sizes, &mut sides, &mut run)?;
            let mut lasting = sides.into_iter().filter(|side| !side.left_out);
            lasting.try_for_each(Side::end)
        });
    run.end(outcome)
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
    Container(Box<Probed<'s>>),
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

    /// Measures one thing in one of its folders. A QEMU that fails is left out from there on.
    fn measure(
        &mut self,
        work: Work,
        folder: usize,
        (reads, sizes): (u32, Sizes),
        out: &str,
        round: Round,
        run: &mut Run<'_>,
    ) -> Result<()> {
        interrupt::check()?;
        let name = self.name;
        let (ways, folder) = self.folders[folder];
        run.now(&format!("{name}, {}", work.name()));
        if work.is_cold() && !drop_caches() {
            run.document
                .note("the host's caches cannot be dropped: nothing is cold there");
        }
        let words = work.words(folder, out, reads);
        let asked = self.ask(&words).and_then(|answer| {
            let (unit, value) = work.value(&answer, sizes, reads)?;
            Ok((unit, value, answer.remark()))
        });
        let asked = asked.with_context(|| {
            let round = round.number + 1;
            format!("{name} failed in round {round}, {}", words.join(" "))
        });
        let (unit, value, remark) = match asked {
            Ok(asked) => asked,
            Err(error) if matches!(self.place, Place::Qemu(_)) => {
                interrupt::check_after_failure()?;
                run.failed(&format!("{error:#}"));
                self.left_out = true;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if let Some(remark) = remark {
            run.document.note(&format!("{name}: {remark}"));
        }
        for way in ways.iter().filter(|_| round.counts) {
            run.add(way.name(), name, work.name(), unit, value);
        }
        Ok(())
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
            place: Place::Container(Box::new(place)),
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

fn measure(
    options: &Options,
    sizes: Sizes,
    sides: &mut [Side<'_>],
    run: &mut Run<'_>,
) -> Result<()> {
    // Each way of each side has its turns.
    let places: Vec<(usize, usize)> = (0..sides.len())
        .flat_map(|side| (0..sides[side].folders.len()).map(move |folder| (side, folder)))
        .collect();
    let rounds = options.all_rounds();
    run.expect(rounds);
    run.rounds("storage", rounds, |run, round| {
        for work in ALL {
            for turn in turns(places.len(), round.number) {
                let (at, folder) = places[turn];
                let out = format!("out-{turn}-{}", round.number);
                let side = &mut sides[at];
                if !side.left_out {
                    side.measure(work, folder, (options.reads, sizes), &out, round, run)?;
                }
            }
        }
        Ok(())
    })
}

/// Drops what the host has in its caches; whether it could.
fn drop_caches() -> bool {
    nix::unistd::sync();
    std::fs::write("/proc/sys/vm/drop_caches", DROP_ALL).is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::options::tests::options;
    use super::*;
    use crate::bench::report::Unit;

    #[test]
    fn runc_stands_beside_both_ways() {
        let options = options("--qemu /q --virtiofsd /v").unwrap();
        let peers = [OURS, "runc"].map(|name| Peer {
            name,
            program: format!("/bin/{name}").into(),
            ..Peer::default()
        });
        let setting = Setting::default();
        let mut run = Run::new("storage", options.settings(Path::new("/d")), &setting);
        run.document.tables.extend(options.tables(&peers));
        for (side, ways, value) in [
            (OURS, &[Way::Blk][..], 4.0),
            (OURS, &[Way::Fs], 6.0),
            ("runc", &Way::BOTH, 2.0),
            (QEMU, &[Way::Fs], 12.0),
        ] {
            for (way, work) in ways.iter().flat_map(|way| ALL.map(|work| (way, work))) {
                run.add(way.name(), side, work.name(), Unit::Ms, value);
            }
        }
        let text = run.document.text();
        for words in ["virtio-blk", "virtio-fs", "3.00", "0.50"] {
            assert!(text.contains(words), "{words} in {text}");
        }
        assert_eq!(run.document.settings["dir"], "/d");
        for (table, ours) in run.document.tables.iter().zip([4.0, 6.0]) {
            assert_eq!(table.values(OURS, "untar"), [ours]);
            assert_eq!(table.values("runc", "untar"), [2.0]);
        }
    }
}
