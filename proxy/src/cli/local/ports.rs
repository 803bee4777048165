//! The ports that the mesh of this machine listens at, looked at before anything is started: who finds one taken wants to
//! know by whom, and the processes that will listen there could only say that it is.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::time::Instant;

use super::super::Failure;
use super::super::holder::{Holder, holder};
use super::places::GATEWAY_V4;

/// Returns when all of them are free. What an earlier mesh left is given time to end.
///
/// # Errors
/// One is taken: by whom, and what to do.
pub(crate) async fn all_free() -> Result<(), Failure> {
    let deadline = Instant::now() + ENDS_WITHIN;
    for (address, what) in ports() {
        while let Err(error) = try_listen(address) {
            let holder = holder(address);
            // Processes of a supervisor that was killed are told to end, and may take a moment.
            if holder.as_ref().is_some_and(Holder::is_role) && Instant::now() < deadline {
                tokio::time::sleep(POLL).await;
                continue;
            }
            return Err(failure(address, what, &error, holder.as_ref()));
        }
    }
    Ok(())
}

/// Those that are not free at this moment, each with its holder and what to do.
pub(crate) fn taken() -> Vec<Failure> {
    let looked = ports().into_iter().map(|(address, what)| (address, what, try_listen(address)));
    looked.filter_map(|(address, what, found)| Some(failure(address, what, &found.err()?, holder(address).as_ref()))).collect()
}

fn ports() -> [(SocketAddr, &'static str); 5] {
    let (here, any) = (Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED);
    [
        ((GATEWAY_V4, STREAM_PORT).into(), "the control plane's stream"),
        ((here, STREAM_PORT).into(), "the control plane's stream"),
        ((here, API_PORT).into(), "the API and the dashboard"),
        ((any, CONTROL_METRICS_PORT).into(), "the control plane's metrics"),
        ((any, NODE_METRICS_PORT).into(), "the node agent's metrics"),
    ]
}

fn try_listen(address: SocketAddr) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // The bridge may not be there yet.
    socket.set_freebind_v4(true)?;
    socket.bind(&address.into())?;
    socket.listen(1)
}

fn failure(address: SocketAddr, what: &str, error: &io::Error, holder: Option<&Holder>) -> Failure {
    let port = address.port();
    if error.kind() != io::ErrorKind::AddrInUse {
        return Failure::environment(format!("cannot listen at {address} for {what}: {error}"), "run as root");
    }
    match holder {
        Some(holder) => Failure::environment(
            format!("port {port}, for {what}, is taken by {holder}"),
            format!("stop it, for example with `kill {}`, and run `outrigger up` again", holder.process),
        ),
        None => Failure::environment(
            format!("port {port}, for {what}, is taken, and nothing in /proc tells by whom"),
            format!("stop what `ss -ltnp 'sport = :{port}'` shows, and run `outrigger up` again"),
        ),
    }
}

pub(super) const STREAM_PORT: u16 = 14_010;
pub(super) const CONTROL_METRICS_PORT: u16 = 14_014;
pub(super) const API_PORT: u16 = 14_080;
pub(super) const NODE_METRICS_PORT: u16 = 14_030;

/// The control plane's streams and the node agent's work end within this, or they hang.
const ENDS_WITHIN: Duration = Duration::from_secs(8);
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_told_with_its_holder_and_a_remedy_that_up_has() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = try_listen(address).unwrap_err();
        let own = std::process::id();
        assert_eq!(holder(address).map(|holder| holder.process), Some(own));
        let named = Holder { process: own, command: "nginx -g daemon".to_owned() };
        let told = format!("{:?}", failure(address, "the API", &error, Some(&named)));
        for part in [format!("port {}", address.port()), format!("process {own} ("), format!("`kill {own}`")] {
            assert!(told.contains(&part), "{part} is not in {told}");
        }
        assert!(!told.contains("--"), "an option that `up` does not have: {told}");
        let told = format!("{:?}", failure(address, "the API", &error, None));
        assert!(told.contains(&format!("sport = :{}", address.port())), "{told}");
        drop(listener);
        assert!(try_listen(address).is_ok());
    }
}
