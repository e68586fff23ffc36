"""A local cluster whose connections all go through the relay, and whose workers keep accounts.

Processes of one machine would speak through shared memory, which nothing can cut: here they use sockets only. Every
start of a shard has a new address, as it has without the relay.
"""

from __future__ import annotations

from pathlib import Path

from deploy.chaos import proc
from deploy.chaos.wires import Wires
from deploy.local import LocalCluster, Topology

COORDINATOR = "coordinator"


class ChaosCluster(LocalCluster):
    """Call `aim_new` now and then: a shard's address has a target as soon as the shard listens.

    Args:
        wires: not closed here.
    """

    def __init__(self, directory: Path, topology: Topology, wires: Wires) -> None:
        super().__init__(directory, topology)
        self.environment = {"PARAMSERVER_SHARED_MEMORY": "off"}
        self.wires = wires
        self._control_port = 0  # of the relay, before the coordinator
        self._unaimed: set[str] = set()  # shards whose port is not known yet

    @property
    def accounts(self) -> Path:
        """The folder of the workers' accounts."""
        return self.directory / "accounts"

    def aim_new(self) -> None:
        pids = self.pids()
        for name in sorted(self._unaimed & pids.keys()):
            if ports := proc.listening_ports(pids[name]):
                self.wires.aim(name, ports[0])
                self._unaimed.discard(name)

    def _joining(self, name: str) -> list[str]:
        if not self._control_port:
            self._control_port = self.wires.open(COORDINATOR)
            self.wires.aim(COORDINATOR, int(self.control.rpartition(":")[2]))
        through = f"tcp://127.0.0.1:{self._control_port}"
        return ["--coordinator", through, "--name", name, *self.topology.key_arguments()]

    def _shard_arguments(self, name: str) -> list[str]:
        self._unaimed.add(name)
        return [*super()._shard_arguments(name), "--advertise", f"tcp://127.0.0.1:{self.wires.open(name)}"]

    def _worker_arguments(self, name: str) -> list[str]:
        return [*super()._worker_arguments(name), "--accounts", str(self.accounts)]
