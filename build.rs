//! Generates the control socket's messages and stubs, and the build id that
//! host and agent tell each other.

use std::path::Path;
use std::process::Command;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .input("src/control/proto/control.proto")
        .include("src/control/proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default())
        .run()
        .expect("src/control/proto/control.proto compiles");
    // The generators' own mod.rs begins with an inner attribute, which `include!` refuses.
    std::fs::write(
        Path::new(&out).join("control_stubs.rs"),
        "pub mod control;\npub mod control_ttrpc;\n",
    )
    .expect("OUT_DIR takes a file");
    println!("cargo::rerun-if-changed=src/control/proto");

    println!("cargo::rerun-if-changed=.git/HEAD");
    // Each commit is in the log. Programs that figures are taken of name the one they are of; others are not built anew for it.
    let log = ".git/logs/HEAD";
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") && Path::new(log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
    println!("cargo::rerun-if-env-changed=NACRE_COMMIT");
    let version = std::env::var("CARGO_PKG_VERSION").expect("cargo sets CARGO_PKG_VERSION");
    let commit = std::env::var("NACRE_COMMIT").ok().or_else(commit);
    let id = match commit {
        Some(commit) => format!("{version} ({commit})"),
        None => version,
    };
    println!("cargo::rustc-env=NACRE_BUILD_ID={id}");
}

/// The checkout's commit, where there is one.
fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let commit = text.trim();
    (output.status.success() && !commit.is_empty()).then(|| commit.to_owned())
}
