//! What a test that was killed leaves: its namespaces, its cgroups, its programs, which go on at the machine's root. The next
//! process that makes a world takes it away.
//!
//! All of it bears a name that says which process made it, and when that one started: a number that the kernel gave to another
//! process since is told from its former bearer, and nothing of a process that lives is touched.

use std::io::BufRead as _;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// What every name begins with.
const OURS: &str = "ork";
/// Where worlds have their folders. What is there does not outlive the machine's own run.
const FOLDERS: &str = "/run";
/// Makes the process that it is given to stand still in a world.
const STANDS: &str = "OUTRIGGER_TEST_STANDS";

/// The name of this process's next world.
pub(super) fn name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let process = std::process::id();
    let started = started(process).unwrap();
    format!("{OURS}{process}x{started}x{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Where a world of this name has its pins.
pub(super) fn pins(name: &str) -> PathBuf {
    Path::new(FOLDERS).join(name).join("bpf")
}

/// Removes the folder of a world whose pins are not mounted any more.
pub(super) fn remove_folder(pins: &Path) {
    fs::remove_dir(pins).and_then(|()| fs::remove_dir(pins.parent().unwrap())).unwrap();
}

/// Takes away what processes that are gone left. What fails has been done by somebody else at the same time.
pub(super) fn sweep(root: &Path) {
    for name in left_in(Path::new(FOLDERS)) {
        let pins = pins(&name);
        Kernel::remove_all(&pins).ok();
        unmount_bpffs(&pins).ok();
        fs::remove_dir(&pins).ok();
        fs::remove_dir(Path::new(FOLDERS).join(&name)).ok();
    }
    for netns in left_in(Path::new("/run/netns")) {
        Command::new("ip").args(["netns", "del", &netns]).status().ok();
    }
    for root in [root, Path::new("/sys/fs/cgroup/memory")] {
        for name in left_in(root) {
            let above = root.join(name);
            for cgroup in [above.join("app"), above.join("sidecar"), above] {
                remove_cgroup(&cgroup);
            }
        }
    }
}

/// The names in `folder` whose process is gone.
fn left_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|name| is_left(name)).collect()
}

/// Is `name` one of ours, and its process gone?
fn is_left(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(OURS) else { return false };
    let mut numbers = rest.splitn(3, 'x');
    let (Some(Ok(process)), Some(Ok(since)), Some(_which)) =
        (numbers.next().map(str::parse::<u32>), numbers.next().map(str::parse::<u64>), numbers.next())
    else {
        return false;
    };
    started(process) != Some(since)
}

/// When the process started, in ticks since the machine did; `None` for one that is dead, also if nobody has waited for it yet.
fn started(process: u32) -> Option<u64> {
    let said = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Its name, in brackets, may hold anything.
    let mut fields = said.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[test]
fn only_what_a_dead_process_made_is_left() {
    let (process, since) = (std::process::id(), started(std::process::id()).unwrap());
    assert!(!is_left(&format!("ork{process}x{since}x0a")), "its maker lives");
    assert!(is_left(&format!("ork{process}x{}x0a", since + 1)), "another process has its maker's number");
    assert!(is_left("ork4294967295x1x0"), "no such process");
    for name in ["outrigger-shop-web", "orkube-node", "ork12x0", "ork", "orkxx"] {
        assert!(!is_left(name), "{name} is not ours");
    }
}

/// Its own process, which is killed.
#[test]
#[ignore = "run by the test below, which kills it"]
fn stands_in_the_middle_of_a_world() {
    if std::env::var_os(STANDS).is_none() {
        return;
    }
    let Some(world) = World::new() else { return };
    let mut kernel = world.open();
    let _listener = world.b.enrol_with_listener(&mut kernel);
    io::stdout().write_all(format!("\nstands {}\n", world.a.netns).as_bytes()).unwrap();
    loop {
        thread::park();
    }
}

#[test]
fn a_killed_tests_world_is_gone_when_the_next_one_is_made() {
    let Some(world) = World::new() else { return };
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--ignored", "--nocapture", "node::kernel::tests::sweep::stands_in_the_middle_of_a_world"]);
    let mut child = child.env(STANDS, "1").stdout(Stdio::piped()).spawn().unwrap();
    let lines = io::BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let netns = lines.filter_map(|line| line.strip_prefix("stands ").map(str::to_owned)).next().unwrap();
    let name = netns.strip_suffix('a').unwrap().to_owned();
    let all = || {
        let mut all = vec![pins(&name), Path::new(FOLDERS).join(&name)];
        for side in ["a", "b"] {
            all.extend([Path::new("/run/netns").join(format!("{name}{side}")), world.root.join(format!("{name}{side}"))]);
        }
        all
    };
    let loaded = |program| ProgramInfo::from_pin(pins(&name).join(program_pin(program))).unwrap().id();
    let programs: Vec<u32> = programs::all().map(loaded).collect();
    sweep(&world.root);
    assert!(all().iter().all(|path| path.exists()), "swept away while its process lives");
    child.kill().unwrap();
    // Dead, and nobody has waited for it.
    while started(child.id()).is_some() {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(all().iter().all(|path| path.exists()), "nothing was left to be swept away");
    sweep(&world.root);
    child.wait().unwrap();
    assert_eq!(all().into_iter().filter(|path| path.exists()).collect::<Vec<_>>(), Vec::<PathBuf>::new());
    for _ in 0..500 {
        if !aya::programs::loaded_programs().filter_map(Result::ok).any(|info| programs.contains(&info.id())) {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("its programs are loaded");
}
