#[path = "../src/boot/payload.rs"] mod payload;
