//! What the shim reads from others than its guest: the bootstrap on stdin and
//! the command line, the durable record, the configuration.

use std::path::PathBuf;
use std::sync::OnceLock;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::Message;

use crate::record::{Holder, Owner, PID, RECORD, Record, Resource, holder};
use crate::shim::bootstrap;
use crate::shim::bootstrap::dialect::{Dialect, recognise, reply};

/// The first byte says which `MAX_SHIM_VERSION` there is; the rest is stdin, and also the command line.
pub(super) fn bootstrap(data: &[u8]) {
    let Some((first, stdin)) = data.split_first() else {
        return;
    };
    let version = [None, Some("2"), Some("3"), Some("junk"), Some("")][usize::from(first % 5)];
    let request = recognise(stdin, version, "ns", "c1");
    if matches!(request.dialect, Dialect::Version2) {
        assert_eq!(version, Some("2"));
    }
    let empty = |text: &str| text.is_empty();
    assert!(!request.ttrpc_address.as_deref().is_some_and(empty));
    assert!(
        !request
            .socket_dir
            .is_some_and(|dir| dir.as_os_str().is_empty())
    );
    assert!(!reply(request.dialect, "unix:///run/x.sock").is_empty());

    let text = String::from_utf8_lossy(stdin);
    let arguments: Vec<String> = text.split('\0').map(str::to_owned).collect();
    if let Ok(flags) = bootstrap::parse(&arguments)
        && matches!(
            flags.action,
            bootstrap::Action::Start | bootstrap::Action::Delete
        )
    {
        assert!(!flags.id.contains('/') && !flags.id.is_empty(), "{flags:?}");
    }
}

pub(super) fn bootstrap_seeds() -> Vec<Vec<u8>> {
    let mut params = BootstrapParams::new();
    params.instance_id = "c1".to_owned();
    params.namespace = "ns".to_owned();
    params.containerd_ttrpc_address = "/run/c.ttrpc".to_owned();
    params.socket_dir = Some("/s".to_owned());
    let after = |first: u8, rest: &[u8]| [&[first][..], rest].concat();
    vec![
        after(0, &params.write_to_bytes().unwrap_or_default()),
        after(1, &params.write_to_bytes().unwrap_or_default()),
        after(2, br#"{"instance_id":"c1","namespace":"ns","log_level":-4}"#),
        after(
            0,
            b" {\"instanceId\":\"c1\",\"namespace\":\"ns\",\"socketDir\":\"/s\",\"logLevel\":\"DEBUG\"}",
        ),
        after(1, b"\x0a\x1acontainerd.runc.v1.Options\x12\x02\x48\x01"),
        after(1, b"-namespace\0ns\0-id\0c1\0-address\0/run/c\0-debug\0start"),
        after(0, b"-namespace=ns\0-id=c1\0-bundle\0/b\0delete"),
    ]
}

/// A record as it may be found after a crash, read and added to. Nothing that it names is freed: those are names of
/// the machine that the fuzzer runs on.
pub(super) fn record(data: &[u8]) {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        // Not on a disk: each record is synchronized.
        let memory = PathBuf::from("/dev/shm");
        let made = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        made.expect("a folder")
    });
    let directory = directory.path();
    std::fs::write(directory.join(RECORD), data).expect("a file");
    match Record::open(directory) {
        Ok(record) => {
            let (owner, before) = (record.owner(), record.resources());
            let new = Resource::File("/new".into());
            record.add(new.clone()).expect("it is written");
            let again = Record::open(directory).expect("what was written is read");
            assert_eq!(again.owner(), owner);
            let mut after = before;
            if !after.contains(&new) {
                after.push(new);
            }
            assert_eq!(again.resources(), after);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    std::fs::write(directory.join(PID), data).expect("a file");
    let found = holder(directory).expect("the file is there");
    assert!(matches!(found, Holder::Gone(_)), "nobody holds it");
}

pub(super) fn record_seeds() -> Vec<Vec<u8>> {
    let owner = Owner {
        id: "c1".to_owned(),
        namespace: "ns".to_owned(),
    };
    let made = || -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let record = Record::create(&folder.path().join("state"), owner)?;
        record.add(Resource::Directory("/run/x".into()))?;
        record.add(Resource::Mount("/run/x/rootfs".into()))?;
        record.add(Resource::Socket("/run/x/s.sock".into()))?;
        Ok(std::fs::read(record.directory().join(RECORD))?)
    };
    vec![
        made().expect("a record"),
        b"12345".to_vec(),
        b"{\"version\":1,\"owner\":{\"id\":\"\",\"namespace\":\"\"},\"resources\":[]}".to_vec(),
    ]
}
