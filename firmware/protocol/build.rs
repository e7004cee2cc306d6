//! Generates the messages and the async ttrpc stubs, and a module file that
//! takes both in.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default())
        .run()
        .expect("proto/agent.proto compiles");
    // The generators' own mod.rs begins with an inner attribute, which `include!` refuses.
    std::fs::write(
        std::path::Path::new(&out).join("stubs.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )
    .expect("OUT_DIR takes a file");
    println!("cargo::rerun-if-changed=proto");
}
