//! The kernel's source, unpacked from Debian's package, and the runs of its makefile.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::apt::Deb;
use crate::paths;
use crate::run::{self, step};

/// What resolving a configuration reads of the source: a fortieth of it.
const FOR_CONFIGURATION: [&str; 3] = ["*/Kconfig*", "*/Makefile*", "*/scripts/*"];
/// How often a build tells how far it is.
const TELLS: Duration = Duration::from_secs(30);
/// Lines of a build's output that are told when it fails.
const LAST_LINES: usize = 25;

/// The source, and a folder for what comes of it.
#[derive(Debug)]
pub struct Tree {
    /// The source's top folder.
    pub source: PathBuf,
    /// Where it is configured and built.
    pub build: PathBuf,
}

impl Tree {
    /// All of the source.
    ///
    /// # Errors
    /// The package does not unpack.
    pub fn whole(deb: &Deb) -> Result<Tree> {
        Tree::unpacked(deb, "source", "build", &[])
    }

    /// As much of it as a configuration takes, unless all of it is there.
    ///
    /// # Errors
    /// As [`Tree::whole`].
    pub fn for_configuration(deb: &Deb) -> Result<Tree> {
        if folder(deb).join("source").exists() {
            // Not where the kernel is built: a configuration that is tried out would have it build anew.
            return Tree::unpacked(deb, "source", "configured", &[]);
        }
        Tree::unpacked(deb, "kconfig", "configured", &FOR_CONFIGURATION)
    }

    fn unpacked(deb: &Deb, source: &str, build: &str, patterns: &[&str]) -> Result<Tree> {
        let folder = folder(deb);
        let tree = Tree {
            source: folder.join(source),
            build: folder.join(build),
        };
        fs::create_dir_all(&tree.build)
            .with_context(|| format!("making {}", tree.build.display()))?;
        if !tree.source.exists() {
            step(format!(
                "unpacking {} of {} {}",
                if patterns.is_empty() {
                    "all (1.7 GB)"
                } else {
                    "what a configuration takes"
                },
                deb.package,
                deb.version
            ));
            let scratch = tempfile::tempdir_in(&folder)?;
            unpack(deb, scratch.path(), patterns)?;
            fs::rename(scratch.keep(), &tree.source)?;
        }
        Ok(tree)
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.build.join(".config")
    }

    /// Resolves a fragment: what it does not set is off, or as it must be.
    ///
    /// # Errors
    /// The kernel's own tools refuse it, or do not know an option of it.
    pub fn configure(&self, fragment: &Path) -> Result<()> {
        let resolved = |target: &str| -> Result<String> {
            let mut command = self.make()?;
            command.args(["--silent", target]);
            command.env("KCONFIG_ALLCONFIG", fragment);
            // Of olddefconfig: an option that it does not know.
            command.env("KCONFIG_WARN_UNKNOWN_SYMBOLS", "1");
            let output = command
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {}", run::show(&command)))?;
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            if !output.status.success() {
                bail!("{} failed: {}\n{said}", run::show(&command), output.status);
            }
            Ok(said)
        };
        // Both, since the second is what a user of the configuration runs, and must change nothing.
        let said = [resolved("allnoconfig")?, resolved("olddefconfig")?].join("\n");
        if said.contains("warning:") || said.contains("WARNING:") {
            bail!(
                "the kernel's source does not take {} as it is: {}",
                fragment.display(),
                said.trim()
            );
        }
        Ok(())
    }

    /// Builds `vmlinux`; the answer is the kernel's release.
    ///
    /// # Errors
    /// It does not build: the last lines of what was said, and where the rest is.
    pub fn build(&self, jobs: usize) -> Result<String> {
        let mut command = self.make()?;
        command.arg(format!("-j{jobs}")).arg("vmlinux");
        let log = self.build.join("build.log");
        step(format!(
            "building the kernel with {jobs} compilers at a time, about ten minutes of two CPUs; log in {}",
            log.display()
        ));
        follow(&mut command, &log)?;
        let release = self.build.join("include/config/kernel.release");
        let text = fs::read_to_string(&release)
            .with_context(|| format!("reading {}", release.display()))?;
        Ok(text.trim().to_owned())
    }

    /// The source's makefile, for the same kernel whoever builds it, wherever and when.
    fn make(&self) -> Result<Command> {
        let makefile = self.source.join("Makefile");
        let written = fs::metadata(&makefile)
            .with_context(|| format!("reading {}", makefile.display()))?
            .mtime();
        let written = run::output(Command::new("date").args(["-u", "-d", &format!("@{written}")]))?;
        let mut command = Command::new("make");
        command.arg("-C").arg(&self.source);
        command.arg(format!("O={}", fs::canonicalize(&self.build)?.display()));
        for (name, value) in [
            ("KBUILD_BUILD_USER", "nacre"),
            ("KBUILD_BUILD_HOST", "nacre"),
            ("KBUILD_BUILD_VERSION", "1"),
            ("KBUILD_BUILD_TIMESTAMP", written.trim()),
            ("LC_ALL", "C"),
        ] {
            command.env(name, value);
        }
        // What a surrounding make, or a shell, would have it do otherwise.
        for name in [
            "MAKEFLAGS",
            "MAKELEVEL",
            "ARCH",
            "CROSS_COMPILE",
            "KCONFIG_CONFIG",
        ] {
            command.env_remove(name);
        }
        Ok(command)
    }
}

/// The folder of a package's trees.
fn folder(deb: &Deb) -> PathBuf {
    paths::cache("kernel-src").join(&deb.version)
}

/// Unpacks the archive that the package holds, or what of it the patterns match.
fn unpack(deb: &Deb, to: &Path, patterns: &[&str]) -> Result<()> {
    let mut package = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb.path())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let mut archive = Command::new("tar")
        .arg("--extract")
        .arg("--to-stdout")
        .arg(format!("./usr/src/{}.tar.xz", deb.package))
        .stdin(pipe(&mut package)?)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start tar")?;
    let mut files = Command::new("tar");
    files
        .args(["--extract", "--xz", "--strip-components=1", "--directory"])
        .arg(to)
        .arg("--wildcards")
        .args(patterns)
        .stdin(pipe(&mut archive)?);
    let unpacked = run::run(&mut files);
    for (mut child, what) in [(package, "dpkg-deb"), (archive, "tar")] {
        let status = child.wait()?;
        if unpacked.is_ok() && !status.success() {
            bail!("{what} failed on {}: {status}", deb.path().display());
        }
    }
    unpacked.with_context(|| format!("unpacking {}", deb.path().display()))?;
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn pipe(child: &mut Child) -> Result<Stdio> {
    Ok(Stdio::from(child.stdout.take().context("no output")?))
}

/// Runs a build with its output in a file, and tells now and then how far it is.
fn follow(command: &mut Command, log: &Path) -> Result<()> {
    let mut file = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let (reader, writer) = std::io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {}", run::show(command)))?;
    // The command holds the pipe's writing end as long as it lives.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let result = watch(reader, &mut file, &mut |text| step(text));
    if result.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let last = result?;
    if !status.success() {
        bail!(
            "{} failed: {status}. All it said is in {}; the last of it:\n{}",
            run::show(command),
            log.display(),
            Vec::from(last).join("\n")
        );
    }
    Ok(())
}

/// Copies lines to the log; the answer is the last ones.
fn watch(
    output: impl Read,
    log: &mut impl Write,
    tell: &mut dyn FnMut(String),
) -> Result<VecDeque<String>> {
    let mut last = VecDeque::new();
    let (started, mut told, mut files) = (Instant::now(), Instant::now(), 0_u32);
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(log, "{line}").context("writing the log of the build")?;
        if let Some(file) = compiled(&line) {
            files += 1;
            if told.elapsed() >= TELLS {
                told = Instant::now();
                let seconds = started.elapsed().as_secs();
                tell(format!(
                    "{files} files in {} min {} s, now {file}",
                    seconds / 60,
                    seconds % 60
                ));
            }
        }
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    Ok(last)
}

/// The file of a line such as `  CC      kernel/fork.o`.
fn compiled(line: &str) -> Option<&str> {
    let mut words = line.strip_prefix("  ")?.split_whitespace();
    let tool = words.next()?;
    matches!(tool, "CC" | "AS" | "AR" | "LD")
        .then(|| words.next())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_build_are_known_by_their_lines() {
        for (line, file) in [
            ("  CC      kernel/fork.o", Some("kernel/fork.o")),
            ("  AR      built-in.a", Some("built-in.a")),
            ("  GEN     Makefile", None),
            ("CC x.o", None),
            ("make[1]: Entering directory", None),
            ("", None),
        ] {
            assert_eq!(compiled(line), file, "{line}");
        }
    }

    #[test]
    fn a_build_that_fails_says_its_last_lines_and_where_the_rest_is() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("build.log");
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            follow(&mut command, &log)
        };
        assert!(shell("echo '  CC      a.o'; echo note >&2").is_ok());
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            "  CC      a.o\nnote\n",
            "both streams are in the log"
        );
        let script =
            "for line in $(seq 100); do echo line $line; done; echo no such header >&2; exit 2";
        let error = shell(script).unwrap_err().to_string();
        for words in ["no such header", "line 100", "build.log", "exit status: 2"] {
            assert!(error.contains(words), "{words} in {error}");
        }
        assert!(!error.contains("line 76\n"), "{error}");
    }
}
