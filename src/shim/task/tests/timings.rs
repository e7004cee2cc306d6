//! What is noted of a container's life, and annotations that come too late.

use super::running::exec_request;
use super::*;
use crate::control::{Phase, Timings};

fn of(stage: &Stage, id: &str) -> Timings {
    let all = stage.shim.timings();
    all.into_iter()
        .find(|timings| timings.container == id)
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_phases_of_a_life_follow_each_other_and_outlive_it() {
    let stage = Stage::set(Manners::default()).await;
    let begun_ns = crate::sandbox::monotonic_ns();
    stage.shim.serves(Some(begun_ns));
    stage.shim.touch();
    let fifo = stage.directory.path().join("stdout");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reading = {
        let fifo = fifo.clone();
        tokio::task::spawn_blocking(move || std::fs::read(fifo).unwrap())
    };
    let mut request = stage.request("c1");
    request.stdout = fifo.to_str().unwrap().to_owned();
    stage.shim.clone().create(request).await.unwrap();
    let created = of(&stage, "c1");
    assert!(created.create.is_some() && created.start.is_none());
    stage.shim.clone().start("c1", "").await.unwrap();
    assert_eq!(of(&stage, "c1").first_output, None);
    let mut stdout = stage.acting.stdout.lock().unwrap().take().unwrap();
    stdout.write_all(b"output").await.unwrap();
    for exec in ["e1", "e2"] {
        stage.shim.clone().exec(exec_request(exec)).await.unwrap();
        stage.shim.clone().start("c1", exec).await.unwrap();
    }
    stage.acting.exit_of("c1", "e1", 0).await;
    stage.shim.wait("c1", "e1").await.unwrap();
    stage.shim.clone().delete("c1", "e1").await.unwrap();
    drop(stdout);
    stage.shim.clone().kill("c1", "", KILL, true).await.unwrap();
    stage.shim.wait("c1", "").await.unwrap();
    assert_eq!(reading.await.unwrap(), b"output");

    let timings = of(&stage, "c1");
    let reached = timings.reached();
    let names: Vec<&str> = reached.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["shim-start", "connect", "create", "start", "first-output"]
    );
    let end = |phase: &Phase| phase.begin_ns + phase.took_ns;
    // Each but the last begins when the one before has ended; output is counted from the beginning of Start.
    for pair in reached[..4].windows(2) {
        assert!(end(&pair[0].1) <= pair[1].1.begin_ns, "{reached:?}");
    }
    assert_eq!(reached[0].1.begin_ns, begun_ns);
    assert_eq!(reached[4].1.begin_ns, reached[3].1.begin_ns);
    let counts = (timings.exec.count, timings.kill.count, timings.delete.count);
    assert_eq!(counts, (2, 1, 1));
    assert!(!timings.deleted);

    stage.shim.clone().delete("c1", "").await.unwrap();
    let gone = of(&stage, "c1");
    assert_eq!((gone.deleted, gone.delete.count), (true, 2));
    assert_eq!(gone.reached(), reached);
}

#[tokio::test(start_paused = true)]
async fn a_second_container_has_no_start_of_the_shim() {
    let stage = Stage::set(Manners::default()).await;
    stage.shim.serves(Some(1));
    stage.shim.touch();
    stage.running("c1").await;
    stage.running("c2").await;
    assert!(of(&stage, "c1").shim_start.is_some());
    let second = of(&stage, "c2");
    assert!(second.shim_start.is_none() && second.connect.is_none());
    assert!(second.create.is_some() && second.start.is_some());
}

#[tokio::test(start_paused = true)]
async fn annotations_that_ask_for_another_vm_are_refused_at_create() {
    let stage = Stage::set(Manners::default()).await;
    let spec = stage.directory.path().join("bundle/config.json");
    let text = std::fs::read_to_string(&spec).unwrap();
    for (annotation, refused) in [
        (r#""io.containerd.other":"1M""#, None),
        (r#""io.nacre.vcpus":"2""#, Some("was started without it")),
        (r#""io.nacre.kernel":"/k""#, Some("not allowed")),
    ] {
        let with = format!(r#"{{"annotations":{{{annotation}}},"#);
        std::fs::write(&spec, text.replacen('{', &with, 1)).unwrap();
        match (stage.create(&annotation[10..14]).await, refused) {
            (Ok(_), None) => {}
            (Err(Error::Invalid(words)), Some(part)) => assert!(words.contains(part), "{words}"),
            (other, _) => panic!("{annotation}: {other:?}"),
        }
    }
}
