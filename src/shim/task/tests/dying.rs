//! The guest ends at each step of Create: Create fails and says why, nothing is
//! left, and a new shim takes the same container.

use containerd_shim_protos::types::mount::Mount;
use nacre_protocol::PORT_CALLS;

use super::*;

/// Where in Create the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Before the guest has dialled.
    Boot,
    /// When it has dialled for the host's calls, before its hello.
    Dialled,
    /// When it is ready, while the root is shared.
    Share,
    /// Asked for the disk.
    BindDisk,
    /// Asked for the container.
    CreateContainer,
    /// When it has dialled the container's stdout.
    Stdio,
    /// As soon as it has answered that the container is made.
    Answer,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Boot,
        Self::Dialled,
        Self::Share,
        Self::BindDisk,
        Self::CreateContainer,
        Self::Stdio,
        Self::Answer,
    ];
}

/// Create with a guest that ends at this step, and what came of it.
async fn create_with_a_guest_that_ends(step: Step) -> (Stage, Result<u32, Error>) {
    let mut stage = Stage::booting(Manners {
        dies: Some(step),
        ..Manners::default()
    });
    let boots = matches!(step, Step::Boot | Step::Dialled);
    if !boots {
        stage.say_hello().await;
    }
    let mut request = stage.request("c1");
    request.stdout = "/dev/null".to_owned();
    if step == Step::BindDisk {
        let mut disk = Mount::new();
        disk.type_ = "ext4".to_owned();
        disk.source = "/disk".to_owned();
        request.rootfs.push(disk);
    }
    let creating = tokio::spawn(stage.shim.clone().create(request));
    if boots || step == Step::Share {
        // Create has begun, and waits.
        while !stage.shim.lock().containers.contains_key("c1") {
            tokio::task::yield_now().await;
        }
        if step == Step::Dialled {
            drop(stage.fake.dial(PORT_CALLS).unwrap());
            tokio::task::yield_now().await;
        }
        stage.fake.end(ExitReason::Panic);
    }
    let created = creating.await.unwrap();
    (stage, created)
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ends_within_create_fails_it_with_the_reason_and_leaves_nothing() {
    for step in Step::ALL {
        let began = tokio::time::Instant::now();
        let (stage, created) = create_with_a_guest_that_ends(step).await;
        match created {
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains("c1") && text.contains("panic"),
                    "{step:?}: {text}"
                );
                assert!(matches!(
                    stage.shim.state("c1", ""),
                    Err(Error::NotFound(_))
                ));
                assert_eq!(stage.shares(), 0, "{step:?}");
                assert!(stage.heard().await.is_empty(), "{step:?}");
            }
            // Only who has answered may be believed, and then the end is an exit. Sharing takes no time in which it is seen.
            Ok(_) => {
                assert!(matches!(step, Step::Answer | Step::Share), "{step:?}");
                assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
                assert_eq!(stage.heard().await, ["create", "exit c1 137"]);
            }
        }
        assert!(began.elapsed() < Duration::from_secs(6), "{step:?}");
        let refused = stage.create("c2").await.unwrap_err().to_string();
        assert!(refused.contains("panic"), "{step:?}: {refused}");
        stage.shim.shut_down();
        assert_eq!(stage.shim.clean_up().await, "", "{step:?}");
        assert!(!stage.directory.path().join("state").exists(), "{step:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_guest_that_ended_within_create_a_new_shim_takes_the_container() {
    for step in Step::ALL {
        let (stage, _) = create_with_a_guest_that_ends(step).await;
        stage.shim.shut_down();
        stage.shim.clean_up().await;
        let stage = stage.succeeded_by(Manners::default()).await;
        stage.running("c1").await;
        stage.acting.exit("c1", 3).await;
        assert_eq!(
            stage.shim.wait("c1", "").await.unwrap().status,
            3,
            "{step:?}"
        );
    }
}

impl Stage {
    /// The next shim, on what this one has left.
    async fn succeeded_by(self, manners: Manners) -> Stage {
        let mut next = Stage::on(self.directory, manners);
        next.say_hello().await;
        next
    }
}
