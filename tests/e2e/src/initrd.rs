//! Initrds of cases: ours with other files in it, such as a first program that
//! does something of the case's before, or beside, the agent. The kernel unpacks one archive after another, the later
//! over the earlier.

use std::fs;
use std::io::{Cursor, Read, Write};

use anyhow::{Context as _, Result, bail};
use cpio::newc::{self, ModeFileType};

use crate::context::Context;
use crate::shim::Bundle;

/// An initrd of the case's own.
pub(crate) struct Initrd {
    initrd: String,
    config: String,
}

impl Initrd {
    /// Ours with `/busybox`. If there is a script, the kernel runs it in place of the agent, which is `/init`.
    pub fn write(context: &Context, script: Option<&str>) -> Result<Self> {
        let initrd = fs::read(&context.programs.initrd)?;
        let busybox = fs::read(&context.programs.busybox)?;
        let mut files = vec![("busybox", busybox)];
        if let Some(script) = script {
            files.push(("first", format!("#!/busybox sh\n{script}\n").into_bytes()));
        }
        let files: Vec<(&str, &[u8])> = files
            .iter()
            .map(|(name, content)| (*name, &content[..]))
            .collect();
        let initrd = with(initrd, &files)?;
        let path = context.path("initrd");
        fs::write(&path, initrd)?;
        let config = context.path("config.toml");
        let text = script.map_or("", |_| "cmdline = \"rdinit=/first\"\n");
        fs::write(&config, text)?;
        Ok(Self {
            initrd: path.display().to_string(),
            config: config.display().to_string(),
        })
    }

    /// Its file.
    pub fn path(&self) -> &str {
        &self.initrd
    }

    /// Has the bundle's shim boot it.
    pub fn boots(self, bundle: &mut Bundle<'_>) {
        bundle.environment.push(("NACRE_CONFIG", self.config));
        bundle.environment.push(("NACRE_INITRD", self.initrd));
    }
}

/// `initrd` with these programs or files over it.
pub(crate) fn with(mut initrd: Vec<u8>, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    for (name, content) in files {
        let mut writer = newc::Builder::new(name)
            .mode(0o755)
            .set_mode_file_type(ModeFileType::Regular)
            .write(&mut initrd, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
    }
    newc::trailer(&mut initrd)?;
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    Ok(initrd)
}

/// `initrd` whose agent does not load this module.
pub(crate) fn without_module(initrd: Vec<u8>, module: &str) -> Result<Vec<u8>> {
    const ORDER: &str = "modules/order";
    let order = file(&initrd, ORDER)?;
    let order = String::from_utf8(order).context("the list of modules")?;
    let others: Vec<&str> = order
        .lines()
        .filter(|line| !line.ends_with(&format!(" {module}.ko")))
        .collect();
    if others.len() == order.lines().count() {
        bail!("the initrd has no module {module}: {order}");
    }
    with(
        initrd,
        &[(ORDER, format!("{}\n", others.join("\n")).as_bytes())],
    )
}

/// A file of the first archive.
fn file(initrd: &[u8], name: &str) -> Result<Vec<u8>> {
    let mut rest = Cursor::new(initrd);
    loop {
        let mut reader = newc::Reader::new(rest).context("reading the initrd")?;
        if reader.entry().is_trailer() {
            bail!("the initrd has no {name}");
        }
        if reader.entry().name() == name {
            let mut content = Vec::new();
            reader.read_to_end(&mut content)?;
            return Ok(content);
        }
        rest = reader.finish()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_left_out_of_the_order_alone() {
        let order = b"boot virtio_blk.ko\nlate virtio_mem.ko\n";
        let initrd = with(Vec::new(), &[("init", b"agent"), ("modules/order", order)]).unwrap();
        assert_eq!(file(&initrd, "init").unwrap(), b"agent");
        let length = initrd.len();
        let other = without_module(initrd.clone(), "virtio_mem").unwrap();
        assert_eq!(other[..length], initrd);
        let order = file(&other[length..], "modules/order").unwrap();
        assert_eq!(order, b"boot virtio_blk.ko\n");
        without_module(initrd, "virtio_m").unwrap_err();
        file(&other, "missing").unwrap_err();
    }
}
