//! One VM and everything in it.
// F writes. The face that the shim (E) and vmctl use:
//
// pub struct SandboxConfig { pub id: String, pub namespace: String, pub directory: PathBuf /* state dir of this VM */, pub hostname: String,
//     pub kernel: PathBuf, pub initrd: PathBuf, pub vcpus: u8, pub memory_mib: u64, pub console: ConsoleSink, ... }
// #[derive(Clone)] pub struct Sandbox (Arc inside)
// impl Sandbox {
//   /// Starts the VM and returns at once; the boot goes on in the background (needs a tokio runtime).
//   pub fn boot(config: SandboxConfig) -> Result<Sandbox, Error>;
//   /// Completes when the agent is ready, or fails with why it never will be (VM exit reason + last console lines).
//   pub async fn ready(&self) -> Result<Arc<Ready>, Error>;
//   /// A fresh port with a listener, for one stdio stream.
//   pub fn stdio_listener(&self) -> Result<VsockListener, Error>;      // listener.port() goes into Stdio
//   /// Plugs the image as a disk, has the agent bind it, answers with the guest's device path.
//   pub async fn attach_disk(&self, disk: DiskConfig) -> Result<AttachedDisk{window, device}, Error>;
//   pub async fn detach_disk(&self, window: u8) -> Result<(), Error>;
//   /// Unary calls to the agent with a deadline each (config `agent_timeout`), errors typed: Timeout | Gone(ExitReason) | Refused{code,message}
//   pub async fn create_container(&self, id, spec_json: Vec<u8>, rootfs: Vec<GuestMount>, stdio: Stdio) -> Result<u32 /*guest pid*/, Error>;
//   pub async fn start(&self, id, exec_id) -> Result<u32, Error>;
//   pub async fn signal(&self, id, exec_id, signal, all) -> Result<(), Error>;
//   pub async fn pids(&self, id) -> Result<Vec<Process>, Error>;
//   pub async fn resize_pty(..); pub async fn delete_container(&self, id) -> Result<(), Error>;
//   /// Events of the agent in order; one receiver.
//   pub fn events(&self) -> Option<mpsc::Receiver<AgentEvent>>;   // AgentEvent::{Exit{..}, Oom{..}}
//   /// Ordered end: agent Shutdown (2 s at most), then stop. Idempotent.
//   pub async fn shutdown(&self) -> ExitReason;
//   pub fn stop(&self);                 // hard
//   pub async fn ended(&self) -> ExitReason;
//   pub fn phases(&self) -> BootPhases (serde)
// }
// sandbox::storage: pub fn rootfs_image(from: &Path /*mounted rootfs dir*/, image: &Path) -> Result<(), Error>  — ext4 by mkfs.ext4 -d, sparse, room for writing
// sandbox::spec: pub fn for_guest(spec: &oci Spec) -> Result<Vec<u8>, Error> — adapts: refuses host bind mounts by name, removes host-only parts (network namespace path, cgroupsPath, hooks…) with reasons
// record: durable cleanup record (json, fsync, rename) + `cleanup(dir)` which frees all that a record names, used by the shim's `delete` and `vmctl`.
