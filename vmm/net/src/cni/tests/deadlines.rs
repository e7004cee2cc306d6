//! Plugins that take long, say much, hear nothing, or outlive who runs them.

use std::process::{Command, Stdio};

use serde_json::json;

use super::*;
use crate::cni::{Kind, process};

fn one(host: &Host, config: Value) -> Attachment {
    let mut plugin = config;
    plugin["type"] = json!("only");
    host.attachment("1.0.0", json!([plugin]))
}

fn end(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

#[test]
fn a_slow_plugin_is_killed_with_its_children_at_the_deadline() {
    let host = Host::new();
    let (own, child) = (host.path("own"), host.path("child"));
    host.silent_plugin(
        "only",
        &format!(
            "test $CNI_COMMAND = DEL && exit 0\necho waits for a lock >&2\necho $$ >{}\nsleep 300 &\necho $! >{}\nwait",
            own.display(),
            child.display()
        ),
    );
    let mut attachment = one(&host, json!({}));
    attachment.timeout = Duration::from_secs(4);
    let start = Instant::now();
    let error = add(&mut attachment).unwrap_err();
    assert!(start.elapsed() >= Duration::from_secs(4));
    assert!(start.elapsed() < Duration::from_secs(60));
    assert_eq!(error.kind(), Kind::Timeout);
    let words = error.to_string();
    assert!(
        words.contains("4s") && words.contains("waits for a lock"),
        "{words}"
    );
    // Reaped, not only dead.
    let own = host.pid("own");
    assert!(!Path::new("/proc").join(own.to_string()).exists());
    let child = host.pid("child");
    until("end of the child", || !runs(child));
}

#[test]
fn a_plugin_that_is_slow_in_del_holds_up_no_other() {
    let host = Host::new();
    host.plugin("first", "");
    host.silent_plugin("slow", "exec sleep 300");
    let plugins = json!([{"type": "first"}, {"type": "slow"}]);
    let mut attachment = host.attachment("1.0.0", plugins);
    attachment.timeout = Duration::from_secs(5);
    assert_eq!(attachment.del().unwrap_err().kind(), Kind::Timeout);
    assert_eq!(host.order(), ["DEL first"]);
}

#[test]
fn output_without_end_is_cut_off() {
    let host = Host::new();
    let own = host.path("own");
    host.silent_plugin(
        "only",
        &format!(
            "test $CNI_COMMAND = DEL && exit 0\necho $$ >{}\nexec yes",
            own.display()
        ),
    );
    let error = add(&mut one(&host, json!({}))).unwrap_err();
    assert_eq!(error.kind(), Kind::Output);
    let words = error.to_string();
    assert!(words.contains(&process::STDOUT.to_string()), "{words}");
    assert!(!runs(host.pid("own")));
}

#[test]
fn more_than_a_mebibyte_is_cut_off_there() {
    let host = Host::new();
    let finished = host.path("finished");
    host.silent_plugin(
        "only",
        &format!("head -c 4194304 /dev/zero && echo >{}", finished.display()),
    );
    let attachment = one(&host, json!({}));
    assert_eq!(
        add(&mut attachment.clone()).unwrap_err().kind(),
        Kind::Output
    );
    assert_eq!(attachment.del().unwrap_err().kind(), Kind::Output);
    assert!(!finished.exists());
    let mut most = result();
    most["filling"] = json!("");
    let room = process::STDOUT - most.to_string().len();
    most["filling"] = json!("x".repeat(room));
    std::fs::write(host.path("most"), most.to_string()).unwrap();
    host.silent_plugin("only", &format!("exec cat {}", host.path("most").display()));
    assert_eq!(add(&mut attachment.clone()).unwrap().raw(), &most);
}

#[test]
fn the_last_words_of_a_plugin_that_ends_at_once_are_heard() {
    let host = Host::new();
    let mut long = result();
    long["filling"] = json!("x".repeat(60 << 10));
    std::fs::write(host.path("result"), long.to_string()).unwrap();
    host.silent_plugin(
        "only",
        &format!("exec cat {}", host.path("result").display()),
    );
    let attachment = one(&host, json!({}));
    for _ in 0..100 {
        assert_eq!(add(&mut attachment.clone()).unwrap().raw(), &long);
    }
}

#[test]
fn a_plugin_that_reads_nothing_of_much_is_fine() {
    let host = Host::new();
    host.silent_plugin("only", &format!("exec <&-\n{}", says(&result())));
    let filling = "x".repeat(700 << 10);
    add(&mut one(&host, json!({ "filling": filling }))).unwrap();
    // And one that holds the pipe and does not read it.
    host.silent_plugin("only", &says(&result()));
    add(&mut one(&host, json!({ "filling": filling }))).unwrap();
}

#[test]
fn much_in_all_three_pipes_at_once_blocks_nobody() {
    let host = Host::new();
    let mut long = result();
    long["filling"] = json!("y".repeat(700 << 10));
    let file = host.path("result");
    std::fs::write(&file, long.to_string()).unwrap();
    let stdin = host.path("stdin");
    host.silent_plugin(
        "only",
        &format!(
            "head -c 524288 /dev/zero | tr '\\0' z >&2\ncat {}\ncat >{}",
            file.display(),
            stdin.display()
        ),
    );
    let filling = "x".repeat(700 << 10);
    let added = add(&mut one(&host, json!({ "filling": filling }))).unwrap();
    assert_eq!(added.raw(), &long);
    let read: Value = serde_json::from_slice(&std::fs::read(&stdin).unwrap()).unwrap();
    assert_eq!(read["filling"], json!(filling));
}

#[test]
fn the_end_of_much_stderr_is_kept() {
    let host = Host::new();
    host.silent_plugin(
        "only",
        "test $CNI_COMMAND = DEL && exit 0\nhead -c 524288 /dev/zero | tr '\\0' z >&2\nprintf 'the last\\nwords' >&2\nexit 7",
    );
    let error = add(&mut one(&host, json!({}))).unwrap_err();
    assert_eq!(error.kind(), Kind::Plugin);
    let words = error.to_string();
    assert!(
        words.contains("exit status: 7") && words.contains("zzzthe last words"),
        "{words}"
    );
    assert_eq!(error.answer().unwrap().msg.len(), process::STDERR);
    assert!(words.len() < process::STDERR + 1000, "{}", words.len());
}

#[test]
fn what_a_plugin_leaves_running_is_not_waited_for() {
    let host = Host::new();
    let daemon = host.path("daemon");
    host.silent_plugin(
        "only",
        &format!(
            "sleep 100 &\necho $! >{}\n{}",
            daemon.display(),
            says(&result())
        ),
    );
    let start = Instant::now();
    add(&mut one(&host, json!({}))).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    let daemon = host.pid("daemon");
    assert!(runs(daemon));
    end(daemon);
}

#[test]
fn other_children_of_the_process_are_left_alone() {
    let host = Host::new();
    host.silent_plugin("only", &says(&result()));
    let mut ended = Command::new("true").spawn().unwrap();
    let mut running = Command::new("sleep").arg("100").spawn().unwrap();
    let mut attachment = one(&host, json!({}));
    add(&mut attachment).unwrap();
    attachment.del().unwrap();
    assert!(ended.wait().unwrap().success());
    assert!(running.try_wait().unwrap().is_none());
    running.kill().unwrap();
    running.wait().unwrap();
}

#[test]
fn several_attachments_at_once_do_not_mind_each_other() {
    let host = Host::new();
    host.silent_plugin("only", &format!("cat >/dev/null\n{}", says(&result())));
    let attachment = one(&host, json!({}));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut attachment = attachment.clone();
                add(&mut attachment).unwrap();
                attachment.del().unwrap();
            });
        }
    });
}

#[test]
fn a_program_that_is_still_being_written_is_waited_for() {
    let host = Host::new();
    host.silent_plugin("only", &says(&result()));
    let path = host.path("bin/only");
    let file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    let mut attachment = one(&host, json!({}));
    let writer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(file);
    });
    add(&mut attachment).unwrap();
    writer.join().unwrap();
}

#[test]
fn what_is_to_be_done_before_the_program_is_done_in_its_process() {
    let host = Host::new();
    host.silent_plugin(
        "only",
        &format!(
            "echo $(ulimit -n) >{}\n{}",
            host.path("own").display(),
            says(&result())
        ),
    );
    let mut attachment = one(&host, json!({}));
    let prepare = || {
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current = Some(77);
        Ok(rustix::process::setrlimit(
            rustix::process::Resource::Nofile,
            limit,
        )?)
    };
    // SAFETY: two system calls, and no more.
    unsafe { attachment.before_exec(prepare) };
    add(&mut attachment).unwrap();
    assert_eq!(host.pid("own"), 77);
    // SAFETY: it makes an error of a number.
    unsafe { attachment.before_exec(|| Err(std::io::Error::from_raw_os_error(libc::EPERM))) };
    let error = attachment.del().unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    assert!(
        text_of(&error).contains("not permitted"),
        "{}",
        text_of(&error)
    );
}

/// This test runs itself as another process, which is killed in the midst of ADD.
#[test]
fn a_process_that_is_killed_takes_its_plugin_with_it_and_leaves_a_note() {
    const DIRECTORY: &str = "NACRE_CNI_TEST_NOTE";
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        let directory = PathBuf::from(directory);
        let network = Conflist::load(directory.join("net.d/10-db.conflist")).unwrap();
        let dirs = vec![directory.join("bin")];
        let mut attachment = Attachment::new(network, dirs, "c1", INTERFACE, NETNS);
        let note = &mut |noted: &Attachment| {
            std::fs::write(directory.join("note"), serde_json::to_vec(noted)?)
        };
        attachment.add(note).unwrap();
        return;
    }
    let host = Host::new();
    host.plugin(
        "only",
        &format!(
            "test $CNI_COMMAND = DEL && exit 0\necho $$ >{}\nexec sleep 300",
            host.path("own").display()
        ),
    );
    one(&host, json!({}));
    let name = std::thread::current().name().unwrap().to_owned();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([&name, "--exact", "--test-threads=1"])
        .env(DIRECTORY, host.path(""))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let plugin = host.pid("own");
    assert!(runs(plugin));
    victim.kill().unwrap();
    victim.wait().unwrap();
    until("end of the plugin", || !runs(plugin));
    let note = std::fs::read(host.path("note")).unwrap();
    let noted: Attachment = serde_json::from_slice(&note).unwrap();
    assert_eq!(noted.result(), None);
    noted.del().unwrap();
    assert_eq!(host.order(), ["ADD only", "DEL only"]);
}
