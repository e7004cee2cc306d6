//! Create, Delete, Kill and Shutdown, each begun while each of the others is
//! under way: what they answer is in the table of docs/conformance.md, and
//! whichever comes first, nothing is left. The lots are the same in every run;
//! a failure names its own.

use super::*;

const TABLE: &str = include_str!("../../../../docs/conformance.md");
const ROUNDS: u64 = 50;

/// Numbers by lot (SplitMix64), the same for the same beginning.
#[derive(Debug, Default)]
pub(super) struct Lots(u64);

impl Lots {
    fn beginning(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Create,
    Delete,
    Kill,
    Shutdown,
}

impl Call {
    const ALL: [Self; 4] = [Self::Create, Self::Delete, Self::Kill, Self::Shutdown];

    async fn call(self, shim: Arc<Shim>, request: CreateTaskRequest) -> &'static str {
        let answer = match self {
            Self::Create => shim.create(request).await.map(drop),
            Self::Delete => shim.delete("c1", "").await.map(drop),
            Self::Kill => shim.kill("c1", "", KILL, false).await,
            Self::Shutdown => {
                shim.shut_down();
                // As the daemon does then.
                let failures = shim.clean_up().await;
                assert_eq!(failures, "");
                Ok(())
            }
        };
        match answer {
            Ok(()) => "OK",
            Err(Error::NotFound(_)) => "NOT_FOUND",
            Err(Error::AlreadyExists(_)) => "ALREADY_EXISTS",
            Err(Error::Invalid(_)) => "INVALID_ARGUMENT",
            Err(Error::Precondition(_)) => "FAILED_PRECONDITION",
            Err(Error::Unimplemented(_)) => "UNIMPLEMENTED",
            Err(Error::Failed(_)) => "INTERNAL",
        }
    }
}

/// What the document permits the two calls to answer.
fn permitted(first: Call, second: Call) -> [Vec<&'static str>; 2] {
    let begin = format!("| {first:?} | {second:?} |");
    let row = TABLE
        .lines()
        .find_map(|line| line.strip_prefix(&begin))
        .unwrap_or_else(|| panic!("docs/conformance.md has no row {begin}"));
    let mut cells = row.split('|').map(|cell| {
        cell.split(',')
            .map(str::trim)
            .filter(|code| !code.is_empty())
            .collect()
    });
    [cells.next().unwrap(), cells.next().unwrap()]
}

/// Brings c1 into one of the states that the first call may meet.
async fn prepare(stage: &Stage, first: Call, second: Call, lots: &mut Lots) -> &'static str {
    if first == Call::Create || second == Call::Create && first == Call::Shutdown {
        return "none";
    }
    stage.create("c1").await.unwrap();
    match lots.below(3) {
        0 => "created",
        1 => {
            stage.shim.clone().start("c1", "").await.unwrap();
            "running"
        }
        _ => {
            stage.shim.clone().start("c1", "").await.unwrap();
            stage.acting.exit("c1", 3).await;
            stage.shim.wait("c1", "").await.unwrap();
            "stopped"
        }
    }
}

async fn race(first: Call, second: Call, seed: u64) {
    let mut lots = Lots::beginning(seed);
    let stage = Stage::set(Manners {
        slow: 12,
        ..Manners::default()
    })
    .await;
    *stage.acting.lots.lock().unwrap() = Lots::beginning(!seed);
    let state = prepare(&stage, first, second, &mut lots).await;
    let what = format!("{first:?} and {second:?} of a container that is {state}, lot {seed}");

    let one = tokio::spawn(first.call(stage.shim.clone(), stage.request("c1")));
    // Half of them by turns of the scheduler, which reach the moments that take no time, and the making of the image.
    if lots.below(2) == 0 {
        for _ in 0..lots.below(120) {
            tokio::task::yield_now().await;
        }
    } else {
        tokio::time::sleep(Duration::from_millis(lots.below(40))).await;
    }
    let other = tokio::spawn(second.call(stage.shim.clone(), stage.request("c1")));
    let limit = Duration::from_secs(30);
    let both = async { [one.await, other.await] };
    let answers = tokio::time::timeout(limit, both)
        .await
        .unwrap_or_else(|_| panic!("{what}: not answered within {limit:?}"))
        .map(|answer| answer.unwrap_or_else(|error| panic!("{what}: {error}")));
    for (answer, permitted) in answers.iter().zip(permitted(first, second)) {
        assert!(permitted.contains(answer), "{what}: {answers:?}");
    }
    if first == second && matches!(first, Call::Create | Call::Delete) {
        let fine = answers.iter().filter(|answer| **answer == "OK").count();
        assert!(fine <= 1, "{what}: {answers:?}");
    }
    expect_nothing_left(stage, &what, [first, second].contains(&Call::Shutdown)).await;
}

/// Ends what the race has left on purpose, and looks for what it should not have.
async fn expect_nothing_left(stage: Stage, what: &str, ended: bool) {
    let shim = stage.shim.clone();
    if !ended {
        if shim.state("c1", "").is_ok() {
            // It may be gone, or about to be.
            let _ = shim.clone().kill("c1", "", KILL, true).await;
            let _ = shim.wait("c1", "").await;
            let _ = shim.clone().delete("c1", "").await;
        }
        assert_eq!(shim.lock().containers.len(), 0, "{what}: a container");
        assert_eq!(stage.shares(), 0, "{what}: a share");
        assert_eq!(stage.fake.disks(), 0, "{what}: a disk");
        assert!(!stage.fake.has_ended(), "{what}: the VM has ended");
        shim.shut_down();
        assert_eq!(shim.clean_up().await, "", "{what}");
    }
    assert!(stage.fake.has_ended(), "{what}: the VM goes on");
    let directory = stage.directory.path().join("state");
    assert!(!directory.exists(), "{what}: the state directory");
    let heard = stage.heard().await;
    let told = |topic: &str| {
        heard
            .iter()
            .filter(|heard| heard.starts_with(topic))
            .count()
    };
    assert_eq!(told("create"), told("exit"), "{what}: {heard:?}");
    assert!(told("delete") <= told("create"), "{what}: {heard:?}");
    drop(stage);
    // Longer than any of them may live on.
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!(Arc::strong_count(&shim), 1, "{what}: somebody has the shim");
}

async fn races(first: Call) {
    for second in Call::ALL {
        for round in 0..ROUNDS {
            let seed = (first as u64) << 16 | (second as u64) << 8 | round;
            race(first, second, seed).await;
        }
        println!("{first:?} and {second:?}: lots 0 to {}", ROUNDS - 1);
    }
}

#[tokio::test(start_paused = true)]
async fn create_raced_with_each_call_answers_by_the_table_and_leaves_nothing() {
    races(Call::Create).await;
}

#[tokio::test(start_paused = true)]
async fn delete_raced_with_each_call_answers_by_the_table_and_leaves_nothing() {
    races(Call::Delete).await;
}

#[tokio::test(start_paused = true)]
async fn kill_raced_with_each_call_answers_by_the_table_and_leaves_nothing() {
    races(Call::Kill).await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_raced_with_each_call_answers_by_the_table_and_leaves_nothing() {
    races(Call::Shutdown).await;
}
