"""Label selectors against all pods at once.

Pods with the same namespace and labels are one *subject*. A set of subjects is
a Python integer with a bit per subject, so that a selector costs a few bitwise
operations, however many pods there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lockgate.objects.model import LabelSelector, Namespace

__all__ = ["Index", "PodSelector", "Selector", "Subjects", "selector_key"]

#: A label selector as a value: the equal labels, then (key, operator, values).
Selector = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, tuple[str, ...]], ...]]

NAME_LABEL = "kubernetes.io/metadata.name"


class PodSelector(NamedTuple):
    """Pods of one namespace (`namespace`), or of all that `namespaces` matches."""

    namespace: str
    namespaces: Selector | None
    pods: Selector | None


def selector_key(selector: LabelSelector) -> Selector:
    """The selector as a hashable value; selectors that mean the same may differ."""
    return (
        tuple(sorted(selector.match_labels.items())),
        tuple(
            sorted((e.key, e.operator, tuple(sorted(e.values))) for e in selector.match_expressions)
        ),
    )


class Index:
    """Sets of label holders by label; bit n stands for the n-th holder added."""

    def __init__(self) -> None:
        self.all = 0
        self._pair: dict[tuple[str, str], int] = defaultdict(int)
        self._key: dict[str, int] = defaultdict(int)

    def add(self, number: int, labels: Iterable[tuple[str, str]]) -> None:
        bit = 1 << number
        self.all |= bit
        for pair in labels:
            self._pair[pair] |= bit
            self._key[pair[0]] |= bit

    def match(self, selector: Selector) -> int:
        """The holders whose labels meet every requirement."""
        found = self.all
        for pair in selector[0]:
            found &= self._pair.get(pair, 0)
        for key, operator, values in selector[1]:
            if operator == "Exists":
                found &= self._key.get(key, 0)
            elif operator == "DoesNotExist":
                found &= ~self._key.get(key, 0)
            else:
                named = 0
                for value in values:
                    named |= self._pair.get((key, value), 0)
                # NotIn matches as well when the key is missing.
                found &= named if operator == "In" else ~named
        return found


class Subjects:
    """Every (namespace, labels) seen; numbers are stable as long as the instance lives."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, frozenset[tuple[str, str]]], int] = {}
        self._subjects: list[tuple[str, frozenset[tuple[str, str]]]] = []
        self._pods = Index()
        self._by_namespace: dict[str, int] = defaultdict(int)
        self._namespaces = Index()
        self._namespace_names: list[str] = []
        self._known: Mapping[str, Namespace] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, namespace: str, labels: Mapping[str, str]) -> int:
        key = (namespace, frozenset(labels.items()))
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            self._subjects.append(key)
            self._pods.add(number, labels.items())
            self._by_namespace[namespace] |= 1 << number
        return number

    def set_namespaces(self, namespaces: Mapping[str, Namespace]) -> None:
        """Learn the namespaces' labels; a namespace only pods speak of has its name label."""
        self._namespaces, self._known = Index(), namespaces
        self._namespace_names = sorted(namespaces.keys() | self._by_namespace.keys())
        for number, name in enumerate(self._namespace_names):
            self._namespaces.add(number, self._namespace_labels(name).items())

    def _namespace_labels(self, name: str) -> dict[str, str]:
        known = self._known.get(name)
        return {**(known.metadata.labels if known else {}), NAME_LABEL: name}

    def match(self, selector: PodSelector) -> int:
        """The subjects that `selector` matches."""
        if selector.namespaces is None:
            found = self._by_namespace.get(selector.namespace, 0)
        elif selector.namespaces == ((), ()):
            found = self._pods.all
        else:
            found = 0
            matching = self._namespaces.match(selector.namespaces)
            while matching:
                low = matching & -matching
                name = self._namespace_names[low.bit_length() - 1]
                found |= self._by_namespace.get(name, 0)
                matching ^= low
        if found and selector.pods is not None:
            found &= self._pods.match(selector.pods)
        return found

    def matching(self, number: int, selectors: Sequence[PodSelector]) -> int:
        """The positions of the `selectors` that match one subject, as bits."""
        namespace, labels = self._subjects[number]
        pod, space = Index(), Index()
        pod.add(0, labels)
        space.add(0, self._namespace_labels(namespace).items())
        found = 0
        for position, selector in enumerate(selectors):
            if selector.namespaces is None:
                here = selector.namespace == namespace
            else:
                here = space.match(selector.namespaces) != 0
            if here and (selector.pods is None or pod.match(selector.pods)):
                found |= 1 << position
        return found
