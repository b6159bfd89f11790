"""The folder of manifests: events to states, and errors that change nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lockgate.kube.folder import Folder, Update


def namespace(name: str) -> str:
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n"


def names(update: Update) -> list[str]:
    return sorted(item.metadata.name for item in update.objects)


async def until(updates: AsyncIterator[Update], wanted: list[str], errors: int = 0) -> Update:
    """The first update with these objects and that many errors."""
    async with asyncio.timeout(5):
        async for update in updates:
            if names(update) == wanted and len(update.errors) == errors:
                return update
    raise AssertionError("the folder came to its end")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(namespace("a"))
    (tmp_path / "notes.txt").write_text("not: [a manifest")
    (tmp_path / ".hidden.yaml").write_text("not: [a manifest")
    return tmp_path


async def test_every_way_to_save_is_seen(home: Path) -> None:
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "b.yaml").write_text(namespace("b"))
        await until(updates, ["a", "b"])
        (home / "b.yaml").write_text(namespace("c"))
        await until(updates, ["a", "c"])
        (home / ".b.swp").write_text(namespace("d"))
        os.rename(home / ".b.swp", home / "b.yaml")
        await until(updates, ["a", "d"])
        os.rename(home / "b.yaml", home / "e.yml")
        await until(updates, ["a", "d"])
        (home / "e.yml").unlink()
        await until(updates, ["a"])
        (home / "sub").mkdir()
        (home / "sub" / "f.json").write_text(
            '{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"f"}}'
        )
        await until(updates, ["a", "f"])


async def test_a_broken_file_is_named_and_everything_stays(home: Path) -> None:
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "b.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: 7}\n")
        update = await until(updates, ["a"], errors=1)
        assert "b.yaml, document 1" in update.errors[0]
        assert "metadata.name" in update.errors[0]
        # A right change of another file waits until the whole is right again.
        (home / "a.yaml").write_text(namespace("new"))
        await until(updates, ["a"], errors=1)
        (home / "b.yaml").write_text(namespace("b"))
        await until(updates, ["b", "new"])


async def test_two_files_with_one_name_are_an_error(home: Path) -> None:
    (home / "b.yaml").write_text(namespace("a"))
    with Folder(home) as folder:
        assert len(folder.refresh(first=True).errors) == 1


async def test_an_editor_that_moves_the_file_away_first_removes_nothing(home: Path) -> None:
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        os.rename(home / "a.yaml", home / "a.yaml~")
        (home / "a.yaml").write_text(namespace("a2"))
        (home / "a.yaml~").unlink()
        async with asyncio.timeout(5):
            assert names(await anext(updates)) == ["a2"]


async def test_one_file_is_a_source_too(home: Path) -> None:
    with Folder(home / "a.yaml") as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "b.yaml").write_text(namespace("b"))
        (home / "a.yaml").write_text(namespace("c"))
        await until(updates, ["c"])


async def test_refresh_sees_what_was_saved_before_any_event(home: Path) -> None:
    with Folder(home) as folder:
        first = folder.refresh(first=True)
        (home / "b.yaml").write_text(namespace("b"))
        assert names(folder.refresh()) == ["a", "b"]
        assert names(first) == ["a"]


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: os.mkfifo(path), "expected a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "expected a regular file"),
        (lambda path: os.symlink(path.name, path), "Too many levels of symbolic links"),
    ],
    ids=["pipe", "device_without_end", "link_to_itself"],
)
async def test_what_is_no_file_is_named_and_read_never(
    home: Path, make: Callable[[Path], None], words: str
) -> None:
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        make(home / "odd.yaml")
        assert folder.refresh().errors == [f"odd.yaml: {words}"]
        number = folder.current.number
        assert folder.refresh().number == number, "nothing new"
        (home / "odd.yaml").unlink()
        await until(updates, ["a"])


async def test_a_folder_that_is_moved_away_is_an_error_until_it_is_back(home: Path) -> None:
    (home / "shop").mkdir()
    os.rename(home / "a.yaml", home / "shop" / "a.yaml")
    with Folder(home / "shop") as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        os.rename(home / "shop", home / "elsewhere")
        update = await until(updates, ["a"], errors=1)
        assert update.errors == [f"{home / 'shop'}: no such file or folder any more"]
        (home / "shop").mkdir()
        await until(updates, ["a"], errors=1)
        (home / "shop" / "b.yaml").write_text(namespace("b"))
        await until(updates, ["b"])
        (home / "shop" / "b.yaml").write_text(namespace("c"))
        await until(updates, ["c"])


async def test_a_folder_that_is_deleted_is_an_error(home: Path) -> None:
    (home / "shop").mkdir()
    os.rename(home / "a.yaml", home / "shop" / "a.yaml")
    with Folder(home / "shop") as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        shutil.rmtree(home / "shop")
        await until(updates, ["a"], errors=1)


async def test_an_emptied_folder_is_an_error(home: Path) -> None:
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "a.yaml").unlink()
        update = await until(updates, ["a"], errors=1)
        assert update.errors == [f"{home}: no manifests (*.yaml, *.yml or *.json)"]


async def test_a_single_file_that_is_deleted_is_an_error(home: Path) -> None:
    with Folder(home / "a.yaml") as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "a.yaml").unlink()
        await until(updates, ["a"], errors=1)
        (home / "a.yaml").write_text(namespace("b"))
        await until(updates, ["b"])


async def test_a_renamed_folder_is_watched_on(home: Path) -> None:
    (home / "sub").mkdir()
    (home / "sub" / "b.yaml").write_text(namespace("b"))
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a", "b"])
        (home / "sub").rename(home / "other")
        (home / "other" / "c.yaml").write_text(namespace("c"))
        await until(updates, ["a", "b", "c"])
        (home / "other" / "c.yaml").write_text(namespace("d"))
        await until(updates, ["a", "b", "d"])


async def test_links_to_files_and_folders_are_followed(home: Path, tmp_path_factory: Any) -> None:
    elsewhere: Path = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "b.yaml").write_text(namespace("b"))
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "link").symlink_to(elsewhere)
        await until(updates, ["a", "b"])
        (elsewhere / "c.yaml").write_text(namespace("c"))
        await until(updates, ["a", "b", "c"])
        (elsewhere / "ring").symlink_to(home)
        (elsewhere / "c.yaml").unlink()
        await until(updates, ["a", "b"])
        (home / "link").unlink()
        await until(updates, ["a"])
        (home / "d.yaml").symlink_to(elsewhere / "b.yaml")
        await until(updates, ["a", "b"])
        (elsewhere / "b.yaml").write_text(namespace("e"))
        await until(updates, ["a", "e"])
        (elsewhere / "new").write_text(namespace("f"))
        (elsewhere / "new").rename(elsewhere / "b.yaml")
        await until(updates, ["a", "f"])


async def test_a_mounted_configmap_is_saved_by_moving_a_link(home: Path) -> None:
    for version in ("1", "2"):
        (home / f"..{version}").mkdir()
        (home / f"..{version}" / "b.yaml").write_text(namespace(f"b{version}"))
    (home / "..data").symlink_to("..1")
    (home / "b.yaml").symlink_to("..data/b.yaml")
    with Folder(home) as folder:
        updates = aiter(folder)
        await until(updates, ["a", "b1"])
        (home / "..data_tmp").symlink_to("..2")
        (home / "..data_tmp").rename(home / "..data")
        await until(updates, ["a", "b2"])


async def test_a_linked_single_file_is_followed(home: Path, tmp_path_factory: Any) -> None:
    link: Path = tmp_path_factory.mktemp("elsewhere") / "link.yaml"
    link.symlink_to(home / "a.yaml")
    with Folder(link) as folder:
        updates = aiter(folder)
        await until(updates, ["a"])
        (home / "a.yaml").write_text(namespace("b"))
        await until(updates, ["b"])


def test_an_enormous_file_is_refused_unread(home: Path) -> None:
    with (home / "disk.yaml").open("wb") as file:
        file.truncate(100 << 30)
    with Folder(home) as folder:
        assert folder.refresh(first=True).errors == [
            "disk.yaml: expected at most 32 MiB, got 102400 MiB"
        ]
