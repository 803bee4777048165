//! The control plane's end of the configuration stream, as a state machine without sockets, clock or tasks.
