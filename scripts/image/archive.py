"""Folders → layers → one archive that `ctr images import`, `docker load` and `podman load` take.

The archive is an OCI image layout with Docker's manifest.json beside it. It is the same byte for
byte when its contents are: entries are sorted, belong to root and bear time 0, so a layer changes
only with what is in it. Formats: opencontainers/image-spec, image-layout.md and config.md.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Layer", "pack", "write"]

_MEDIA = "application/vnd.oci.image."


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. `diff_id` is the digest of the plain tar, `blob` the gzip of it."""

    name: str
    blob: bytes
    diff_id: str
    size: int  # bytes of the plain tar


def pack(name: str, root: Path) -> Layer:
    """The contents of folder `root` as a layer. ValueError for what belongs in no image."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _walk(root):
            info = tar.gettarinfo(path, str(path.relative_to(root)))
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise ValueError(f"{path} is neither file, folder nor symbolic link")
            # A second name of a file is a file of its own: nothing depends on what was read first.
            if info.islnk():
                info.type, info.size = tarfile.REGTYPE, path.stat().st_size
            info.uid = info.gid = info.mtime = 0
            info.uname = info.gname = ""
            info.mode &= 0o1755  # nothing is setuid, nothing writable by others but /tmp
            if path.is_dir() and info.name == "tmp":
                info.mode = 0o1777
            if info.isreg():
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
    data = plain.getvalue()
    return Layer(name, gzip.compress(data, 6, mtime=0), _digest(data), len(data))


def write(
    target: Path,
    layers: Sequence[Layer],
    names: Sequence[str],
    *,
    architecture: str,
    created: int,
    config: dict[str, Any],
) -> None:
    """`names` are full ("localhost/lockgate:1.0"); `created` is in seconds since 1970; `config` is
    the image's own part of its configuration. The file appears whole or not at all."""
    when = datetime.datetime.fromtimestamp(created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"})}

    def add(data: bytes, kind: str) -> dict[str, Any]:
        digest = _digest(data)
        files[_path(digest)] = data
        return {"mediaType": _MEDIA + kind, "digest": digest, "size": len(data)}

    image = add(
        _json(
            {
                "created": when,
                "architecture": architecture,
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
                "history": [{"created": when, "comment": layer.name} for layer in layers],
            }
        ),
        "config.v1+json",
    )
    blobs = [add(layer.blob, "layer.v1.tar+gzip") for layer in layers]
    manifest = add(
        _json(
            {
                "schemaVersion": 2,
                "mediaType": _MEDIA + "manifest.v1+json",
                "config": image,
                "layers": blobs,
            }
        ),
        "manifest.v1+json",
    )
    platform = {"architecture": architecture, "os": "linux"}
    files["index.json"] = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MEDIA + "index.v1+json",
            "manifests": [
                {**manifest, "platform": platform, "annotations": _names(name)} for name in names
            ],
        }
    )
    files["manifest.json"] = _json(
        [
            {
                "Config": _path(image["digest"]),
                "RepoTags": list(names),
                "Layers": [_path(blob["digest"]) for blob in blobs],
            }
        ]
    )
    part = target.with_suffix(".part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    part.replace(target)


def _names(name: str) -> dict[str, str]:
    # containerd takes the first, everybody else the second.
    return {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }


def _walk(root: Path) -> Iterator[Path]:
    """Everything below `root`, folders before what is in them, sorted."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
