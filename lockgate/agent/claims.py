"""Which pod a uid is of.

The API server's uids are its own, but the object that mirrors a static pod tells the pod's
(`lockgate.kube.kinds.uid_on_node`), and whoever may create pods can write one that tells another
pod's. A lease, an endpoint id and a slot go by the uid: so that nobody takes over another's, no two
objects have the same one here. One that is refused is there under a uid of its own, which no pod
that asks for an endpoint has.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lockgate.kube.stream import Change, Transaction
from lockgate.objects.changes import Name
from lockgate.objects.model import Pod

__all__ = ["Claims"]


class Claims:
    """A uid is the pod's that the container runtime named with it; before that, the one's that
    came first, for as long as its object is there or its lease lasts. Lives in the event loop."""

    def __init__(
        self, leased: Callable[[str], bool], earlier: Callable[[str], Name | None]
    ) -> None:
        """`leased`: has this uid a lease? `earlier`: whose it was when it was last in force, also
        for an agent before."""
        self._leased, self._earlier = leased, earlier
        #: By uid the pod that has it.
        self.names: dict[str, Name] = {}
        # Pods as they came; by uid those that claim it and don't have it, in order.
        self._pods: dict[Name, Pod] = {}
        self._refused: dict[str, dict[Name, None]] = {}
        # What `errors` last said, while it holds.
        self._errors: list[str] | None = []

    def uid(self, name: Name) -> str:
        """That which the pod claims; "" if it is not known."""
        pod = self._pods.get(name)
        return "" if pod is None else pod.metadata.uid

    def errors(self) -> list[str]:
        """Who was refused what; the same list while there is no change."""
        if self._errors is None:
            self._errors = [
                f"Pod {'/'.join(name)}: metadata.annotations: kubernetes.io/config.mirror: {uid} is"
                f" Pod {'/'.join(self._owner(uid) or ('?',))}'s, which keeps it"
                for uid, names in self._refused.items()
                for name in names
            ]
        return self._errors

    def take(self, transaction: Transaction) -> Transaction:
        """The same, with no uid twice."""
        changes = transaction.changes
        if transaction.complete:
            before = self.names
            self.names, self._pods, self._refused, self._errors = {}, {}, {}, None

            def is_new(change: Change) -> bool:
                meta = change.object.metadata
                owner = before.get(meta.uid) or self._earlier(meta.uid)
                return owner != (meta.namespace, meta.name)

            changes = sorted(changes, key=is_new)
        taken: list[Change] = []
        for change in changes:
            if change.object.kind == "Pod":
                self._take(change, taken)
            else:
                taken.append(change)
        return msgspec.structs.replace(transaction, changes=taken)

    def believe(self, uid: str, name: Name) -> list[Change]:
        """The container runtime, which has it from the kubelet, says that `uid` is that of the pod
        `name`, which claims it. Returns what is another by that."""
        owner = self.names.get(uid)
        if owner == name or self.uid(name) != uid:
            return []
        self._withdraw(uid, name)
        self.names[uid] = name
        changes = [Change("MODIFIED", self._pods[name])]
        if owner is not None:
            changes.append(Change("MODIFIED", self._refuse(self._pods[owner])))
        return changes

    # ---- Inside ----------------------------------------------------------------------

    def _owner(self, uid: str) -> Name | None:
        owner = self.names.get(uid)
        return self._earlier(uid) if owner is None and self._leased(uid) else owner

    def _take(self, change: Change, taken: list[Change]) -> None:
        pod: Pod = change.object
        before, uid = self.uid(pod.key), pod.metadata.uid
        gone = change.verb == "DELETED"
        freed = ""
        if before and (gone or before != uid):
            self._withdraw(before, pod.key)
            if self.names.get(before) == pod.key:
                del self.names[before]
                freed = before
        if gone:
            self._pods.pop(pod.key, None)
            taken.append(change)
        else:
            self._pods[pod.key] = pod
            taken.append(Change(change.verb, self._admit(pod)))
        for name in self._refused.get(freed, ()):
            waiting = self._pods[name]
            if self._owner(freed) in (None, name):
                taken.append(Change("MODIFIED", self._admit(waiting)))
                break

    def _admit(self, pod: Pod) -> Pod:
        uid = pod.metadata.uid
        if not uid:
            return pod
        if self._owner(uid) not in (None, pod.key):
            return self._refuse(pod)
        self._withdraw(uid, pod.key)
        self.names[uid] = pod.key
        return pod

    def _refuse(self, pod: Pod) -> Pod:
        self._errors = None
        self._refused.setdefault(pod.metadata.uid, {})[pod.key] = None
        meta = msgspec.structs.replace(pod.metadata, uid="/".join(pod.key))
        return msgspec.structs.replace(pod, metadata=meta)

    def _withdraw(self, uid: str, name: Name) -> None:
        refused = self._refused.get(uid)
        if refused is not None:
            self._errors = None
            refused.pop(name, None)
            if not refused:
                del self._refused[uid]
