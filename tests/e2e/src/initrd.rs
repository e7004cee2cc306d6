//! Initrds of cases: ours, with a busybox and a first program that does
//! something of the case's before, or beside, the agent.

use std::fs;
use std::io::Write;

use anyhow::Result;
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
        let mut initrd = fs::read(&context.programs.initrd)?;
        // A second archive after the first, which the kernel unpacks over it.
        let busybox = fs::read(&context.programs.busybox)?;
        let mut files = vec![("busybox", busybox)];
        if let Some(script) = script {
            files.push(("first", format!("#!/busybox sh\n{script}\n").into_bytes()));
        }
        for (name, content) in files {
            let mut writer = newc::Builder::new(name)
                .mode(0o755)
                .set_mode_file_type(ModeFileType::Regular)
                .write(&mut initrd, u32::try_from(content.len())?);
            writer.write_all(&content)?;
            writer.finish()?;
        }
        newc::trailer(&mut initrd)?;
        initrd.resize(initrd.len().next_multiple_of(512), 0);
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

    /// Has the bundle's shim boot it.
    pub fn boots(self, bundle: &mut Bundle<'_>) {
        bundle.environment.push(("NACRE_CONFIG", self.config));
        bundle.environment.push(("NACRE_INITRD", self.initrd));
    }
}
