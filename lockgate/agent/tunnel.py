"""The node's VXLAN device: made when a node is to be reached through it, kept when it is there,
removed when none is."""

from __future__ import annotations

import errno

from lockgate.agent.cards import TUNNEL, Card
from lockgate.agent.datapath import Datapath
from lockgate.net import dumps, vxlan

__all__ = ["TUNNEL_ID", "TunnelDevice"]

#: bpf/types.h; macros leave no BTF.
TUNNEL_ID = 0x6C67


class TunnelDevice:
    """For the worker thread, in the node's namespace."""

    def __init__(self, dp: Datapath, port: int) -> None:
        self._dp, self._port = dp, port
        self._attached = self._wanted = 0

    def ensure(self, mtu: int) -> Card:
        """The device. What arrives by it is the stack's until `attach`, and made out to nobody.
        OSError says what keeps it from being."""
        try:
            index = vxlan.ensure(TUNNEL, self._port, mtu)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or vxlan.supported():
                raise
            raise OSError(
                error.errno,
                "This machine has no VXLAN devices: the kernel needs CONFIG_VXLAN",
            ) from error
        return Card(TUNNEL, index, dumps.link(index)[0], mtu)

    def attach(self, index: int) -> None:
        """from_net on it, which has its role by now; or later, `attach_waiting`. From now on the
        cards' programs know what is for it."""
        self._dp.state.view["tunnel_port"][0] = self._port
        self._wanted = index
        if not self._dp.pending:
            self.attach_waiting()

    def attach_waiting(self) -> None:
        """What was not attached while maps of another version were in force."""
        if self._attached != self._wanted:
            self._dp.attach_net(TUNNEL, self._wanted)
            self._attached = self._wanted

    def remove(self) -> None:
        """Nothing there is success."""
        vxlan.remove(TUNNEL)
        self._dp.state.view["tunnel_port"][0] = 0
        self._attached = self._wanted = 0
        self._dp.detach_net(TUNNEL)
