"""Thin links on one machine: network namespaces, veth pairs, and a token bucket on both ends of each.

A hub holds the servers; every end is a namespace of its own behind its own link to the hub. The namespaces
have no names and nothing of them is ever in the machine's own: each lives as long as a process that waits
for the end of this one, so the kernel takes everything away however this process ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paramserver.cli.bench.crew import Crew, Line, MeasurementError, say_all
from paramserver.cli.errors import InputError

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "cat": "coreutils"}
HUB_ADDRESS = "10.77.255.1"
END_INTERFACE = "eth0"
QUEUE_SECONDS = 0.05  # what a bucket holds back before it drops, as a cheap switch does
BURST_SECONDS, LEAST_BURST_BYTES = 0.004, 128 * 1024  # a segment that the kernel did not cut yet must fit
START_SECONDS = 5.0
CLONE_NEWNET = 0x40000000
SAMPLE_SECONDS = 0.02
PROBE_BYTES = 64 * 1024
SETTLE_SECONDS = 1.0  # of a plain stream, before it is measured


def congestion_control() -> str:
    """What this kernel's TCP does about a full link; fresh namespaces take it over."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="utf-8").strip()


def end_address(number: int) -> str:
    return f"10.77.{number}.2"


class Links:
    """A hub and `count` ends, each behind a link of so many megabits a second each way. A context manager.

    Raises InputError where this machine or user cannot make them, saying what is missing.
    """

    def __init__(self, count: int, megabits: int) -> None:
        if missing := [f"{tool} ({package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]:
            raise InputError(f"a shaped link needs {', '.join(missing)}; install it")
        if os.geteuid() != 0:
            raise InputError("a shaped link needs root: network namespaces are made and entered; run it as root")
        self.megabits = megabits
        self._holders: list[subprocess.Popen[bytes]] = []
        try:
            self.hub = self._hold()
            self.ends = [self._hold() for _ in range(count)]
            self._wire()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the namespaces; those of processes that still run in them follow with these."""
        for holder in self._holders:
            holder.kill()
            holder.communicate()
        self._holders.clear()

    def _hold(self) -> int:
        """The process id of a process in a fresh network namespace."""
        # cat ends when its input does, which only this process can write to.
        holder = subprocess.Popen(
            ["unshare", "--net", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
        self._holders.append(holder)
        ours, theirs = os.readlink("/proc/self/ns/net"), Path(f"/proc/{holder.pid}/ns/net")
        deadline = time.monotonic() + START_SECONDS
        while holder.poll() is None and time.monotonic() < deadline:
            if os.readlink(theirs) != ours:
                return holder.pid
            time.sleep(0.005)
        holder.kill()
        said = holder.communicate()[1].decode(errors="replace").strip()
        raise InputError(f"a shaped link needs the right to make network namespaces (CAP_SYS_ADMIN): {said or 'no'}")

    def _wire(self) -> None:
        burst = max(LEAST_BURST_BYTES, int(self.megabits * 1e6 / 8 * BURST_SECONDS))
        limit = burst + int(self.megabits * 1e6 / 8 * QUEUE_SECONDS)
        bucket = f"root tbf rate {self.megabits}mbit burst {burst} limit {limit}"
        self._run(self.hub, "ip link set lo up")
        self._run(self.hub, f"ip address add {HUB_ADDRESS}/32 dev lo")
        for number, end in enumerate(self.ends):
            name = f"link{number}"
            self._run(self.hub, f"ip link add {name} type veth peer name {END_INTERFACE} netns {end}")
            self._run(self.hub, f"ip address add 10.77.{number}.1/24 dev {name}")
            self._run(self.hub, f"ip link set {name} up")
            self._run(end, "ip link set lo up")
            self._run(end, f"ip address add {end_address(number)}/24 dev {END_INTERFACE}")
            self._run(end, f"ip link set {END_INTERFACE} up")
            self._run(end, f"ip route add default via 10.77.{number}.1")
            self._run(self.hub, f"tc qdisc add dev {name} {bucket}")
            self._run(end, f"tc qdisc add dev {END_INTERFACE} {bucket}")
        self._run(self.hub, "tee /proc/sys/net/ipv4/ip_forward", text="1\n")

    def _run(self, namespace: int, command: str, text: str = "") -> None:
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{namespace}/ns/net", *command.split()],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise InputError(
                f"a shaped link cannot be made: `{command}` says: {done.stderr.strip()}; it needs root with "
                "CAP_NET_ADMIN, and a kernel with veth and the token bucket filter (sch_tbf)"
            )


def in_namespace(line: Line, holder: int, target: Callable[..., None], *arguments: Any) -> None:
    """A child's target: enter the network namespace of that process, then run target(line, *arguments)."""
    descriptor = os.open(f"/proc/{holder}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    # Threads that are started from now on, libraries' own too, are in it as well.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")
    os.close(descriptor)
    target(line, *arguments)


class Traffic:
    """What an end's link carries while a timed part runs: bytes each way, and how both ways were used.

    A way is busy in a sample when it carries at least half of what the link takes.
    """

    def __init__(self, megabits: int) -> None:
        self._busy_bytes_per_second = megabits * 1e6 / 8 / 2
        self._samples: list[tuple[float, int, int]] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self._samples = [self._look()]
        self._is_over.clear()
        self._thread = threading.Thread(target=self._watch, name="traffic", daemon=True)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """Bytes and seconds since `begin`, and the share of the time that each combination of ways was busy."""
        assert self._thread is not None  # begin was called
        self._is_over.set()
        self._thread.join()
        self._samples.append(self._look())
        seconds = dict.fromkeys(("both", "up", "down", "idle"), 0.0)
        for (t0, up0, down0), (t1, up1, down1) in zip(self._samples, self._samples[1:], strict=False):
            busy = self._busy_bytes_per_second * (t1 - t0)
            is_up, is_down = up1 - up0 >= busy, down1 - down0 >= busy
            seconds["both" if is_up and is_down else "up" if is_up else "down" if is_down else "idle"] += t1 - t0
        (t0, up0, down0), (t1, up1, down1) = self._samples[0], self._samples[-1]
        shares = {name: value / (t1 - t0) for name, value in seconds.items()}
        return {"seconds": t1 - t0, "sent_bytes": up1 - up0, "received_bytes": down1 - down0, **shares}

    def _watch(self) -> None:
        while not self._is_over.wait(SAMPLE_SECONDS):
            self._samples.append(self._look())

    @staticmethod
    def _look() -> tuple[float, int, int]:
        """(now, bytes sent, bytes received), headers of the link included."""
        # Of the thread's namespace; /proc/net would be the one of the process's first thread.
        for row in Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines():
            name, _, figures = row.partition(":")
            if name.strip() == END_INTERFACE:
                fields = figures.split()
                return time.perf_counter(), int(fields[8]), int(fields[0])
        raise MeasurementError(f"there is no interface {END_INTERFACE} in this namespace")


# --------------------------------------------------------------------- what the link gives


def plain_streams(links: Links, seconds: float) -> tuple[float, float]:
    """(up, down) megabits of payload a second of one plain TCP connection that is used both ways at once."""
    with Crew() as crew:
        hub = crew.start("hub", in_namespace, links.hub, _listening_stream, seconds)
        (port,) = crew.hear([hub], "to listen")
        end = crew.start("end", in_namespace, links.ends[0], _connecting_stream, port, seconds)
        up, down = crew.hear([hub, end], "its stream", START_SECONDS * 4 + seconds)
        say_all([hub, end])  # neither closes while the other still counts
        crew.join([hub, end])
    return up, down


def _listening_stream(line: Line, seconds: float) -> None:
    with socket.create_server((HUB_ADDRESS, 0)) as server:
        server.settimeout(START_SECONDS * 4)
        line.say(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            _stream(line, connection, seconds)


def _connecting_stream(line: Line, port: int, seconds: float) -> None:
    with socket.create_connection((HUB_ADDRESS, port), timeout=START_SECONDS) as connection:
        _stream(line, connection, seconds)


def _stream(line: Line, connection: socket.socket, seconds: float) -> None:
    """Send as fast as it goes, and say how much came in the other way."""
    connection.settimeout(START_SECONDS)
    is_over = threading.Event()

    def send() -> None:
        data = bytes(PROBE_BYTES)
        try:
            while not is_over.is_set():
                connection.sendall(data)
        except OSError:
            pass  # the other end has counted enough and is gone

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    buffer = bytearray(PROBE_BYTES)
    _receive(connection, buffer, SETTLE_SECONDS)
    received, elapsed = _receive(connection, buffer, seconds)
    line.say(received * 8 / elapsed / 1e6)
    line.hear()
    is_over.set()


def _receive(connection: socket.socket, buffer: bytearray, seconds: float) -> tuple[int, float]:
    started, received = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        received += connection.recv_into(buffer)
    return received, elapsed
