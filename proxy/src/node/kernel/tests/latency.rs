//! What capture adds to the set-up of a connection, and to what goes over it, beside a redirection by nftables.
//!
//! One thread is both ends: it connects, accepts and closes, so that the kernel does all of a handshake within `connect`, and no
//! scheduler has a part in it. Nobody, the programs, programs that do the least that leads there, and nftables take turns in the
//! same two namespaces, and all lead to the same listener. What is compared is what each of them adds to nothing.

use aya::programs::ProgramInfo;
use aya::sys::{Stats, enable_stats};
use tokio::time::Instant;

use super::foreign::{attach, balancer, listener_in, passer_by, thief, tracer};
use super::*;

/// How often each has its turn.
const TURNS: usize = 25;
/// Connections of a turn, and round trips over a further one.
const EACH: u32 = 400;
/// What a caller asks for where somebody redirects it.
const PORT: u16 = 7777;

/// Who sends connections to the sidecar's port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum By {
    Nobody,
    Programs,
    /// Foreign programs at the same hooks: one sends the connection where ours do, the others do nothing. They look up nothing,
    /// note nothing, count nothing: what they add, the kernel takes for calling a program at these hooks.
    Least,
    /// The same without the hook of TCP's events.
    LeastUnheard,
    /// The same with a tracepoint in the place of the hook of TCP's events.
    LeastTraced,
    Nftables,
}

const ALL: [By; 6] = [By::Nobody, By::Programs, By::Least, By::LeastUnheard, By::LeastTraced, By::Nftables];

/// Which way a connection goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Outbound,
    /// From a task of this machine, which the programs see connect though it is of no pod.
    Inbound,
    /// From elsewhere: no program is told of the caller's socket.
    InboundFromAfar,
}

/// Medians of a turn, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Turn {
    setup: f64,
    round_trip: f64,
}

#[test]
#[ignore = "measures, and takes the processor for itself"]
fn a_captured_connection_costs_less_to_set_up_than_one_that_nftables_redirects() {
    let Some(world) = World::new() else { return };
    for (way, reach) in [(Way::Outbound, 0.5), (Way::Inbound, 0.25), (Way::InboundFromAfar, 0.25)] {
        let mut turns = [const { Vec::new() }; ALL.len()];
        for number in 0..TURNS {
            for turn in 0..ALL.len() {
                let who = (number + turn) % ALL.len();
                turns[who].push(world.turn(way, ALL[who]));
            }
        }
        let [direct, programs, least, unheard, traced, nftables] = turns;
        let setup = |turns: &[Turn]| Spread::of(turns.iter().map(|turn| turn.setup));
        let added = |turns: &[Turn]| Spread::of(turns.iter().zip(&direct).map(|(turn, direct)| turn.setup - direct.setup));
        let kept =
            |turns: &[Turn]| Spread::of(turns.iter().zip(&direct).map(|(turn, direct)| turn.round_trip / direct.round_trip));
        let of_nftables = |turns: &[Turn]| added(turns).median / added(&nftables).median;
        let ratio = of_nftables(&programs);
        let told = format!(
            "{way:?}, us: set-up direct {}, captured {}, by nftables {}; added {} and {}: {ratio:.2} of it, to reach {reach}\n\
             the least that programs can add: {}, {:.2} of it; not told of TCP's events {:.2}, told by a tracepoint {:.2}\n\
             a round trip over a connection, over that of a direct one: captured {}, by nftables {}\n{}",
            setup(&direct),
            setup(&programs),
            setup(&nftables),
            added(&programs),
            added(&nftables),
            added(&least),
            of_nftables(&least),
            of_nftables(&unheard),
            of_nftables(&traced),
            kept(&programs),
            kept(&nftables),
            world.run_times(way),
        );
        // Past the harness, which keeps what a test that succeeds prints to itself.
        io::stdout().write_all(format!("\n{told}\n").as_bytes()).unwrap();
        assert!(ratio < 1.0, "{ratio:.2} of what nftables adds");
    }
}

impl World {
    fn turn(&self, way: Way, by: By) -> Turn {
        let (called, port) = self.called(way);
        let mut kernel = (by == By::Programs).then(|| self.open_for(way));
        if let Some(kernel) = &mut kernel {
            called.enrol(kernel);
        }
        let listener = called.listen(Who::Sidecar, "::", port);
        if let Some(kernel) = kernel.as_mut().filter(|_| way != Way::Outbound) {
            kernel.register_listener(called.cookie, listener.as_fd()).unwrap();
        }
        let least = self.least(way, by, &listener);
        if by == By::Nftables {
            let hook = if way == Way::Outbound { "output" } else { "prerouting" };
            called.nft(&format!(
                "table inet latency {{\nchain to_sidecar {{\ntype nat hook {hook} priority -100;\n\
                 tcp dport {PORT} redirect to :{port}\n}}\n}}\n"
            ));
        }
        let to = match (by, way) {
            (By::Nobody, Way::Outbound) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            (By::Nobody, _) => (self.b.v4, port).into(),
            (_, _) => (self.b.v4, PORT).into(),
        };
        let turn = self.a.as_(Who::App, || measured(to, &listener));
        drop(least);
        if by == By::Nftables {
            called.nft("delete table inet latency");
        }
        if kernel.is_some() {
            Kernel::remove_all(&self.pins).unwrap();
        }
        turn
    }

    /// Whose sidecar is connected to, and its port.
    fn called(&self, way: Way) -> (&Side, u16) {
        match way {
            Way::Outbound => (&self.a, PORT_OUTBOUND),
            Way::Inbound | Way::InboundFromAfar => (&self.b, PORT_INBOUND),
        }
    }

    /// The cgroup below which programs are told of sockets.
    fn told_of(&self, way: Way) -> &Path {
        if way == Way::InboundFromAfar { &self.b.above } else { &self.root }
    }

    fn open_for(&self, way: Way) -> Kernel {
        Kernel::open(&self.pins, self.told_of(way), Options::default()).unwrap()
    }

    /// Links that go when they are dropped; none for whoever else has its turn.
    fn least(&self, way: Way, by: By, listener: &TcpListener) -> Vec<OwnedFd> {
        let cgroup = File::open(self.told_of(way)).unwrap();
        let told = match by {
            By::Nobody | By::Programs | By::Nftables => return Vec::new(),
            By::Least => Some(attach(&listener_in(), &cgroup, Hook::SockOps)),
            By::LeastUnheard => None,
            By::LeastTraced => Some(tracer()),
        };
        let connect = if way == Way::Outbound { balancer(self.b.v4, Ipv4Addr::LOCALHOST, PORT_OUTBOUND) } else { passer_by() };
        let mut links = Vec::from_iter(told.into_iter().chain([attach(&connect, &cgroup, Hook::Connect4)]));
        if way != Way::Outbound {
            let netns = File::open(Path::new("/run/netns").join(&self.b.netns)).unwrap();
            links.push(attach(&thief(listener), &netns, Hook::SkLookup));
        }
        links
    }

    /// How long each program runs, as the kernel counts it, in a turn that is not compared: counting takes time.
    fn run_times(&self, way: Way) -> String {
        let (called, port) = self.called(way);
        let mut kernel = self.open_for(way);
        called.enrol(&mut kernel);
        let listener = called.listen(Who::Sidecar, "::", port);
        if way != Way::Outbound {
            kernel.register_listener(called.cookie, listener.as_fd()).unwrap();
        }
        let counting = enable_stats(Stats::RunTime).unwrap();
        let to = SocketAddr::from((self.b.v4, PORT));
        self.a.as_(Who::App, || measured(to, &listener));
        drop(counting);
        let mut told = String::from("the programs' own run time:");
        for program in programs::all() {
            let info = ProgramInfo::from_pin(self.pins.join(program_pin(program))).unwrap();
            if info.run_count() > 0 {
                let each = info.run_time().as_nanos() / u128::from(info.run_count());
                told += &format!(" {} {each} ns x {:.1}", program.name, info.run_count() as f64 / f64::from(EACH + 1));
            }
        }
        drop(kernel);
        Kernel::remove_all(&self.pins).unwrap();
        told
    }
}

/// Both ends of connections, on this thread.
fn measured(to: SocketAddr, listener: &TcpListener) -> Turn {
    at_once();
    let connect = || {
        let begun = Instant::now();
        let caller = TcpStream::connect(to).unwrap();
        let took = begun.elapsed();
        let (called, _) = accept(listener);
        // No port waits for its former connection to be forgotten.
        SockRef::from(&caller).set_linger(Some(Duration::ZERO)).unwrap();
        (took, caller, called)
    };
    let setup = median_of((0..EACH).map(|_| connect().0));
    let (_, mut caller, mut called) = connect();
    let mut line = [7; 64];
    let mut round_trip = || {
        let begun = Instant::now();
        caller.write_all(&line).unwrap();
        called.read_exact(&mut line).unwrap();
        called.write_all(&line).unwrap();
        caller.read_exact(&mut line).unwrap();
        begun.elapsed()
    };
    Turn { setup, round_trip: median_of((0..EACH).map(|_| round_trip())) }
}

/// Lets nothing but the kernel come between, where that is allowed.
fn at_once() {
    let first = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is to a whole structure, and the call looks at nothing else.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &first) };
}

/// In microseconds.
fn median_of(took: impl Iterator<Item = Duration>) -> f64 {
    Spread::of(took.map(|took| took.as_secs_f64() * 1e6)).median
}

/// A median and its extremes.
#[derive(Clone, Copy, Debug)]
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self { least: values[0], median: values[values.len() / 2], most: values[values.len() - 1] }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{:.2} ({:.2}-{:.2})", self.median, self.least, self.most)
    }
}
