"""What Linux says of a process: its state, its processor time, its sockets. The only reader of /proc.

Every question about a process that is gone, or is not ours to look at, has the answer of a process that has nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_LISTENING = "0A"
_SOCKET = "socket:["
_TICKS = os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def state(pid: int) -> str:
    """R, S, D, T (stopped), Z (dead and not reaped) ...; empty where there is no such process."""
    fields = _fields(pid)
    return fields[0] if fields else ""


def processor_seconds(pid: int) -> float:
    """User and system time of all threads, since the process began."""
    fields = _fields(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def listening_ports(pid: int) -> list[int]:
    """TCP ports (IPv4) that the process listens on, ascending."""
    own = _socket_inodes(pid)
    return sorted(port for port, status, inode in _tcp() if status == _LISTENING and inode in own)


def owner_of_port(port: int, pids: Iterable[int]) -> int | None:
    """Which of these processes holds the local end of the loopback connection with this port."""
    inodes = {inode for local, status, inode in _tcp() if local == port and status != _LISTENING}
    return next((pid for pid in pids if inodes & _socket_inodes(pid)), None)


def _tcp() -> list[tuple[int, str, str]]:
    """(local port, state, inode) of this network namespace's IPv4 sockets."""
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    rows = [line.split() for line in lines]
    return [(int(row[1].rpartition(":")[2], 16), row[3], row[9]) for row in rows]


def _socket_inodes(pid: int) -> set[str]:
    folder = f"/proc/{pid}/fd"
    found: set[str] = set()
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue  # closed in the meantime
        if target.startswith(_SOCKET):
            found.add(target[len(_SOCKET) : -1])
    return found
