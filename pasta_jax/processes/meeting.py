"""Processes meet, are told of each other's end, and end together.

    meet, start   the others are awaited, then `jax.distributed` is initialized
    report, end   a failure of one is said by the first, and ends all

They meet at the address that `jax.distributed` takes later: its own wait ends in an abort that does not say who is
missing. The connections to the first process stay open, so that one that dies is noticed at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any, NoReturn

from pasta_jax.processes.launchers import Group, ProcessError

TIMEOUT_S = 60.0
"""How long a process waits for the others to come."""

AGREED = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Statuses with which all processes end together: done, or asked to stop."""

LONGEST_LINE = 4096
"""Bytes that are read of what a process says when it comes."""

GRACE_S = 2.0
"""How long a process may take to end by itself after another has failed: it often fails in the same way."""


class SaidElsewhere(ProcessError):
    """The first process said it."""


class Connections:
    """Those between the first process and each of the others, open until they end.

    A failure is printed once, by the first process: `report` sends it there, and the first passes it on to the
    others, which then end without a word. What has no time to be reported, such as a kill, shows as a connection
    that is lost; the first says so, and where it is the first that was lost, each of the others does. A process
    that another one's failure makes fail itself (`has_reported` is false) says only what it was told.

    Args:
      group: the processes.
      peers: sockets by the number of the process at the other end.
    """

    def __init__(self, group: Group, peers: dict[int, socket.socket]):
        self.group, self._peers = group, peers
        self._done, self.has_reported = set[int](), False
        self._failed = threading.Event()
        self._failure, self._was_told = "", False
        self._gone = threading.Event()
        self._first_ended = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="processes", daemon=True).start()

    def say(self, line: str) -> None:
        """Sends a line to all at the other ends."""
        with self._lock:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.sendall(f"{line}\n".encode())

    def report(self, message: str) -> None:
        """The first process prints it; the others have it printed there."""
        line = " ".join(message.splitlines())
        if self.group.index == 0:
            print(message, file=sys.stderr, flush=True)
        self.has_reported = True
        self.say(f"failed {line}")

    def has_failed(self, wait_s: float = 0.0) -> bool:
        """Whether another process failed, as far as is known within this time."""
        return self._failed.wait(wait_s)

    def wait_for_first(self) -> int:
        """Waits until the first process has ended, and returns the status with which this one has to end."""
        self._first_ended.wait()
        return int(self.has_failed())

    def done(self) -> None:
        """Tells the others that this process ends well."""
        self.say("done")

    def leave(self, status: int) -> NoReturn:
        """Ends this process at once: at its end jax would wait for those that are gone.

        The first waits a little for the others to end before, because they abort without it.
        """
        if not self.has_reported:
            if self.has_failed():
                self._say_failure()
            else:
                self.report(f"Process {self.group.index} of {self.group.count} ended with status {status}.")
        if self.group.index == 0:
            self._gone.wait(GRACE_S + 3)
            time.sleep(0.1)
        _exit(status)

    def _say_failure(self) -> None:
        if not self._was_told:
            print(self._failure, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Reads what the others say, and ends this process when one has failed."""
        selector = selectors.DefaultSelector()
        for index, peer in self._peers.items():
            peer.settimeout(None)
            selector.register(peer, selectors.EVENT_READ, index)
        unread = dict.fromkeys(self._peers, b"")
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    received = key.fileobj.recv(65536)  # type: ignore[union-attr]
                except OSError:
                    received = b""
                *lines, unread[key.data] = (unread[key.data] + received).split(b"\n")
                for line in lines:
                    verb, _, text = line.decode(errors="replace").partition(" ")
                    if verb == "done":
                        self._done.add(key.data)
                    elif verb == "failed":
                        self._done.add(key.data)
                        self._fail(key.data, text)
                if not received:
                    selector.unregister(key.fileobj)
                    if key.data not in self._done:
                        self._fail(key.data, "")
                if 0 in self._done or self._failed.is_set():
                    self._first_ended.set()
        self._gone.set()

    def _fail(self, index: int, text: str) -> None:
        """Another process failed: this one has a moment to end by itself, and is ended then."""
        if self._failed.is_set():
            return
        name = f"Process {index} of {self.group.count}"
        lost = f"{name} was lost, and with it the run. Run the same command again to go on."
        if self.group.index == 0:
            self._failure = f"{name}: {text}" if text else lost
            self.say(f"failed {self._failure}")
        else:
            self._failure, self._was_told = text or lost, bool(text)
        self._failed.set()
        threading.Thread(target=self._end_soon, daemon=True).start()

    def _end_soon(self) -> None:
        time.sleep(GRACE_S)
        if not self.has_reported:
            self.has_reported = True
            self._say_failure()
            self.leave(1)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def meet(group: Group, timeout_s: float = TIMEOUT_S) -> dict[int, socket.socket]:
    """Waits until all processes are there.

    Returns:
      at the first process a connection to each of the others, at these one to the first.

    Raises:
      ProcessError: not all came in time; it says who did not, as far as that is known, and what to do.
    """
    return _receive(group, timeout_s) if group.index == 0 else {0: _join(group, timeout_s)}


def _receive(group: Group, timeout_s: float) -> dict[int, socket.socket]:
    """The first process: waits for the others."""
    port, deadline = int(group.address.rpartition(":")[2]), time.monotonic() + timeout_s
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, backlog=group.count, dualstack_ipv6=dual)
    except OSError as error:
        raise ProcessError(
            f"Port {port}, where the processes meet, cannot be used ({error.strerror}): does another run have it? "
            "End that one, or choose another with --coordinator=HOST:PORT."
        ) from error
    peers: dict[int, socket.socket] = {}
    came = list[socket.socket]()
    problem = ""
    with listener, contextlib.closing(_callers(listener, deadline)) as callers:
        while len(peers) < group.count - 1 and not problem:
            peer, line = next(callers, (None, ""))
            if peer is None:
                missing = [str(i) for i in range(1, group.count) if i not in peers]
                names = ", ".join(missing[:16]) + ", ..." * (len(missing) > 16)
                problem = (
                    f"{1 + len(peers)} of {group.count} processes came within {timeout_s:.0f} s; "
                    f"missing: {names}. {group.advice}"
                )
                break
            hello = re.fullmatch(r"pasta_jax ([0-9]{1,6}) ([0-9]{1,6})", line)
            if hello is None:  # a stranger
                peer.close()
                continue
            came.append(peer)
            index, count = map(int, hello.groups())
            if count != group.count or not 0 < index < count:
                problem = f"Process {index} of {count} came, but there are {group.count} here. {group.advice}"
            elif index in peers:
                problem = f"Process {index} came twice: each needs a number of its own. {group.advice}"
            peers.setdefault(index, peer)
    for peer in came:
        peer.setblocking(True)
        with contextlib.suppress(OSError):
            peer.sendall(f"failed {problem}\n".encode() if problem else b"go\n")
    if problem:
        raise ProcessError(problem)
    return peers


def _callers(listener: socket.socket, deadline: float) -> Generator[tuple[socket.socket, str], None, None]:
    """Those that come until the deadline, each with its first line: nobody waits for one that says nothing."""
    listener.setblocking(False)
    unread = dict[socket.socket, bytes]()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    peer: Any = key.fileobj
                    if peer is listener:
                        with contextlib.suppress(OSError):  # it went away
                            peer, _ = listener.accept()
                            peer.setblocking(False)
                            unread[peer] = b""
                            selector.register(peer, selectors.EVENT_READ)
                        continue
                    received = b""
                    with contextlib.suppress(OSError):
                        received = peer.recv(LONGEST_LINE)
                    unread[peer] += received
                    if b"\n" in received:
                        selector.unregister(peer)
                        yield peer, unread.pop(peer).decode(errors="replace").strip()
                    elif not received or len(unread[peer]) >= LONGEST_LINE:
                        selector.unregister(peer)
                        del unread[peer]
                        peer.close()
    finally:
        for peer in unread:
            peer.close()


def _join(group: Group, timeout_s: float) -> socket.socket:
    """Another process: comes to the first, and waits until all are there."""
    host, _, port = group.address.rpartition(":")
    deadline, reason = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < deadline:
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout=5.0)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            with contextlib.suppress(OSError):
                peer.sendall(f"pasta_jax {group.index} {group.count}\n".encode())
            # The first process answers in the time that it waits itself.
            answer = _read_line(peer, timeout_s + 5) or ""
            if answer == "go":
                return peer
            peer.close()
            if answer.startswith("failed "):
                raise SaidElsewhere(answer.removeprefix("failed "))
        time.sleep(0.2)
    raise ProcessError(
        f"The first of {group.count} processes was not met at {group.address} within {timeout_s:.0f} s ({reason}); "
        f"this is process {group.index}. {group.advice}"
    )


def _read_line(peer: socket.socket, timeout_s: float) -> str | None:
    """The next line from a connection, without what follows it; None if it is not whole in time."""
    deadline, received = time.monotonic() + timeout_s, b""
    try:
        while not received.endswith(b"\n") and len(received) < LONGEST_LINE:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
            byte = peer.recv(1)
            if not byte or time.monotonic() > deadline:
                return None
            received += byte
    except OSError:
        return None
    return received.decode(errors="replace").strip()


_connections: Connections | None = None
"""Of this process; only `start` sets it."""


def start(group: Group | None, timeout_s: float = TIMEOUT_S) -> None:
    """Brings the processes together: afterwards `jax.devices()` are those of all. Nothing for a single one.

    Raises:
      ProcessError: as `meet`.
    """
    global _connections
    if group is None:
        return
    peers = meet(group, timeout_s)
    import jax

    # jax would take SIGTERM for itself, and only say at a later step that it came: older versions always do.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if jax.config.values.get("jax_cpu_collectives_implementation") is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        group.address,
        group.count,
        group.index,
        group.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(TIMEOUT_S),
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)
    _connections = Connections(group, peers)


# ------------------------------------------------------------------------------------------------------- ending


def wait_for_first() -> None:
    """Of several processes all but the first wait here until that one has ended, and end too."""
    if _connections is not None and _connections.group.index > 0:
        sys.exit(_connections.wait_for_first())


def has_failed(wait_s: float = 0.0) -> bool:
    """Whether another process has failed, as far as is known within this time."""
    return _connections is not None and _connections.has_failed(wait_s)


def report(message: str) -> None:
    """Says on stderr why this process ends; of several the first says it for all."""
    if _connections is None:
        print(message, file=sys.stderr)
    elif not has_failed():
        _connections.report(message)


def end(status: int) -> None:
    """Ends the part of this process in the run, with this status; returns if it is the only one, or all end so."""
    if _connections is not None:
        if status not in AGREED or _connections.has_reported:
            _connections.leave(status)
        _connections.done()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Of several processes none waits for one that has failed."""
    try:
        yield
    except SystemExit as leaving:
        end(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
        raise
    except Exception:
        if _connections is None:
            raise
        if not has_failed(wait_s=1.0):  # else this only follows from that
            traceback.print_exc()
        end(1)
    else:
        end(0)
