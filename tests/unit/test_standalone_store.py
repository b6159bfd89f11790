"""The stream of objects: batches, bookmarks, late watchers, and who has what in force."""

from __future__ import annotations

import json
from typing import Any

from lockgate.objects.model import Namespace, Node, ObjectMeta, Pod
from lockgate.standalone.store import Store, Watcher


def pod(uid: str, **labels: str) -> Pod:
    return Pod(metadata=ObjectMeta(name="p", namespace="n", uid=uid, labels=labels))


def events(watcher: Watcher) -> list[Any]:
    found = []
    while not watcher.queue.empty():
        batch = watcher.queue.get_nowait()
        assert batch is not None
        found += [json.loads(line) for line in batch.splitlines()]
    return found


def said(watcher: Watcher) -> list[tuple[str, str]]:
    return [
        (event["type"], event.get("object", {}).get("metadata", {}).get("uid", ""))
        for event in events(watcher)
    ]


async def test_a_batch_ends_in_its_bookmark() -> None:
    store = Store()
    watcher = store.watch()
    assert events(watcher) == [{"type": "BOOKMARK", "revision": 0}]
    store.replace({"Namespace": {("", "n"): Namespace(metadata=ObjectMeta(name="n"))}})
    assert events(watcher) == [
        {
            "type": "ADDED",
            "object": {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "n"}},
        },
        {"type": "BOOKMARK", "revision": 1},
    ]


async def test_what_is_equal_makes_no_revision() -> None:
    store = Store()
    store.replace({"Pod": {("n", "p"): pod("1")}})
    watcher = store.watch()
    events(watcher)
    assert store.replace({"Pod": {("n", "p"): pod("1")}}) == 1
    assert events(watcher) == []


async def test_changed_is_modified_and_another_uid_is_another_object() -> None:
    store = Store()
    watcher = store.watch()
    store.replace({"Pod": {("n", "p"): pod("1")}})
    store.replace({"Pod": {("n", "p"): pod("1", a="b")}})
    store.replace({"Pod": {("n", "p"): pod("2")}})
    store.replace({"Pod": {}})
    kinds = [event for event in said(watcher) if event[0] != "BOOKMARK"]
    assert kinds == [
        ("ADDED", "1"),
        ("MODIFIED", "1"),
        ("DELETED", "1"),
        ("ADDED", "2"),
        ("DELETED", "2"),
    ]


async def test_a_late_watcher_gets_everything_first() -> None:
    store = Store()
    store.replace({"Pod": {("n", "p"): pod("1")}})
    assert said(store.watch()) == [("ADDED", "1"), ("BOOKMARK", "")]


async def test_a_revision_is_in_force_when_every_node_says_so() -> None:
    store = Store()
    nodes = {("", name): Node(metadata=ObjectMeta(name=name)) for name in ("a", "b")}
    revision = store.replace({"Node": nodes})
    await store.take_applied("a", revision, None)
    assert store.behind(revision) == ["b"]
    assert not await store.wait_applied(revision, 0.01)
    await store.take_applied("b", revision, None)
    assert await store.wait_applied(revision, 0.01)
    await store.take_applied("b", revision, "the image is full")
    assert store.errors == {"b": "the image is full"}
    assert not await store.wait_applied(revision, 0.01)
