//! Others that decide about the same connections: their kernel programs, and hostile rules of nftables.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, cgroup_root, finish, outrigger, wait_for};
use e2e::runner::{Case, Runner};

use crate::world::{Pair, expect, until};

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || Pair::make(Mesh::up()?, "neighbours");
    let programs = [
        Case { name: "a_program_of_others_where_apps_connect_is_told_of", run: |world: &Pair, _| at_connect(world) },
        Case { name: "a_program_of_others_that_selects_a_pods_sockets_makes_the_mesh_unwell", run: |world, _| in_pod(world) },
    ];
    let rules = [
        Case { name: "captured_connections_are_not_tracked", run: |world: &Pair, _| untracked(world) },
        Case {
            name: "hostile_rules_of_the_machine_change_nothing_between_pods_unless_they_see_bridges",
            run: |world, _| machine(world),
        },
        Case { name: "hostile_rules_in_a_pod_close_it_and_never_open_it", run: |world, _| pods(world) },
    ];
    let has_nft = Command::new("nft").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has_nft {
        for case in &rules {
            runner.left_out("neighbours", case.name, "nft is not there: apt-get install nftables");
        }
    }
    let cases: Vec<Case<Pair>> = programs.into_iter().chain(has_nft.then_some(rules).into_iter().flatten()).collect();
    runner.group("neighbours", make, &cases);
}

/// A program that lets everything pass, attached for as long as this stands.
struct Stranger(Child);

/// By bpf(2) itself: type, hook, name and place are the arguments.
const STRANGER: &str = r#"
import ctypes, os, platform, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
number = 280 if platform.machine() == "aarch64" else 321
def bpf(command, attributes):
    made = libc.syscall(number, command, attributes.ljust(128, b"\0"), 128)
    assert made >= 0, os.strerror(ctypes.get_errno())
    return made
kind, hook, name, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], os.open(sys.argv[4], os.O_RDONLY)
steps = ctypes.create_string_buffer(struct.pack("QQ", 0xb7 | 1 << 32, 0x95))
terms = ctypes.create_string_buffer(b"GPL")
where = [ctypes.addressof(one) for one in (steps, terms)]
program = bpf(5, struct.pack("IIQQIIQII16sII", kind, 2, *where, 0, 0, 0, 0, 0, name.encode(), 0, hook))
link = bpf(28, struct.pack("IIII", program, place, hook, 0))
print("attached", flush=True)
time.sleep(600)
"#;

impl Stranger {
    fn new(kind: u32, hook: u32, name: &str, place: &Path) -> Result<Self> {
        let mut command = Command::new("python3");
        command.args(["-c", STRANGER, &kind.to_string(), &hook.to_string(), name]).arg(place);
        let mut stranger = Self(command.stdout(Stdio::piped()).spawn()?);
        let mut said = String::new();
        BufReader::new(stranger.0.stdout.take().context("no output")?).read_line(&mut said)?;
        ensure!(said.trim() == "attached", "it said {said:?}");
        Ok(stranger)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Waits until `status` says this, with this exit code.
fn told(code: i32, words: &str) -> Result<()> {
    wait_for(&format!("`status` says {words:?}"), PATIENCE, || {
        let said = finish(&mut outrigger(["status"]), PATIENCE)?;
        let text = said.all().split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(said.code == code && text.contains(words), "{}", said.all());
        Ok(())
    })
}

/// Waits until `status` has nothing to say of others.
fn untold() -> Result<()> {
    wait_for("`status` is silent again", PATIENCE, || {
        let said = finish(&mut outrigger(["status"]), PATIENCE)?;
        ensure!(said.code == 0 && !said.all().contains("another program"), "{}", said.all());
        Ok(())
    })
}

fn at_connect(world: &Pair) -> Result<()> {
    let stranger = Stranger::new(18, 10, "bystander", &cgroup_root()?)?;
    told(0, "another program decides about connections: program ")?;
    expect(&world.caller, &["http://web/"], 200)?;
    drop(stranger);
    untold()
}

fn in_pod(world: &Pair) -> Result<()> {
    let netns = Path::new("/run/netns").join(world.web.name.network());
    let stranger = Stranger::new(30, 36, "onlooker", &netns)?;
    told(1, "another program takes connections: neighbours/web: program ")?;
    let ready = finish(Command::new("curl").args(["-sS", "http://127.0.0.1:14030/ready"]), PATIENCE)?.ok()?;
    ensure!(ready.contains("another program takes connections"), "{ready}");
    expect(&world.caller, &["http://web/"], 200)?;
    drop(stranger);
    untold()
}

/// A table of rules, for as long as this stands.
struct Rules {
    /// The pod's network namespace, or nothing for the machine's.
    network: Option<String>,
}

impl Rules {
    fn new(network: Option<String>, chains: &str) -> Result<Self> {
        let rules = Self { network };
        let mut nft = rules.nft(&["-f", "-"]).stdin(Stdio::piped()).spawn()?;
        nft.stdin.take().context("no input")?.write_all(format!("table inet hostile {{\n{chains}\n}}\n").as_bytes())?;
        ensure!(nft.wait()?.success(), "nft refuses {chains}");
        Ok(rules)
    }

    fn nft(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(if self.network.is_some() { "ip" } else { "nft" });
        if let Some(network) = &self.network {
            command.args(["netns", "exec", network, "nft"]);
        }
        command.args(arguments);
        command
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        self.nft(&["delete", "table", "inet", "hostile"]).status().ok();
    }
}

/// Whether the machine's rules see what crosses its bridges, put back when this is dropped.
struct Bridged {
    was: Option<String>,
}

impl Bridged {
    const SETTING: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

    /// Nothing changes where the kernel has no such thing: there they do not.
    fn set(to: &str) -> Result<Self> {
        let Ok(was) = std::fs::read_to_string(Self::SETTING) else { return Ok(Self { was: None }) };
        std::fs::write(Self::SETTING, to)?;
        Ok(Self { was: Some(was) })
    }
}

impl Drop for Bridged {
    fn drop(&mut self) {
        if let Some(was) = &self.was {
            std::fs::write(Self::SETTING, was.trim()).ok();
        }
    }
}

fn machine(world: &Pair) -> Result<()> {
    let hostile = "chain forwarded { type filter hook forward priority -300; policy drop; }
         chain arriving { type nat hook prerouting priority -100; tcp dport { 80, 8080, 14006 } redirect to :9; }";
    let url = format!("http://{}:8080/", world.web.address()?);
    let unseen = Bridged::set("0")?;
    let rules = Rules::new(None, hostile)?;
    for _ in 0..5 {
        expect(&world.caller, &["http://web/"], 200)?;
        expect(&world.caller, &[&url], 200)?;
    }
    drop((rules, unseen));
    let seen = Bridged::set("1")?;
    if seen.was.is_none() {
        return Ok(());
    }
    let rules = Rules::new(None, hostile)?;
    let answer = world.caller.curl(["--max-time", "3", &url])?;
    ensure!(answer.status != 200, "the rules are not seen: {}", answer.said.all());
    closed(&url)?;
    drop((rules, seen));
    until(&world.caller, "http://web/", 200).map(drop)
}

/// From the machine, past every sidecar: the app answers nobody in the clear.
fn closed(url: &str) -> Result<()> {
    let said = finish(Command::new("curl").args(["-sS", "--fail", "--noproxy", "*", "--max-time", "2", url]), PATIENCE)?;
    ensure!(said.code != 0, "the app was reached: {}", said.all());
    Ok(())
}

fn pods(world: &Pair) -> Result<()> {
    let url = "http://web/";
    let direct = format!("http://{}:8080/", world.web.address()?);
    // As another mesh leads what leaves, and what arrives, to a proxy of its own; and rules that let nothing pass.
    for (pod, chains) in [
        (&world.caller, "chain out { type nat hook output priority -100; meta l4proto tcp redirect to :15001; }"),
        (&world.caller, "chain out { type filter hook output priority 0; meta l4proto tcp drop; }"),
        (&world.web, "chain in { type nat hook prerouting priority -100; tcp dport 8080 redirect to :15006; }"),
        (&world.web, "chain in { type filter hook input priority 0; tcp dport 8080 drop; }"),
    ] {
        let rules = Rules::new(Some(pod.name.network()), chains)?;
        let answer = world.caller.curl(["--max-time", "3", "-H", "connection: close", url])?;
        ensure!(answer.status != 200, "with {chains}: {}", answer.said.all());
        closed(&direct).with_context(|| chains.to_owned())?;
        drop(rules);
        until(&world.caller, url, 200)?;
    }
    Ok(())
}

/// Even where the kernel could: a rule of the machine has it track connections.
fn untracked(world: &Pair) -> Result<()> {
    let _rules = Rules::new(None, "chain arriving { type nat hook prerouting priority -100; tcp dport 1 redirect to :9; }")?;
    for _ in 0..5 {
        expect(&world.caller, &["http://web/"], 200)?;
    }
    for pod in [&world.web, &world.caller] {
        let read = ["netns", "exec", &pod.name.network(), "cat", "/proc/sys/net/netfilter/nf_conntrack_count"];
        let count = finish(Command::new("ip").args(read), PATIENCE)?.ok()?;
        ensure!(count.trim() == "0", "{:?} has {count} tracked connections", pod.name);
    }
    Ok(())
}
