"""The process of one cluster: the supervisor and its API in one asyncio loop.

python -m lockgate.standalone.main --cluster NAME --nodes N [--settings JSON] [--detached] FOLDER
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from lockgate.standalone import teardown
from lockgate.standalone.api import serve
from lockgate.standalone.children import Settings
from lockgate.standalone.state import State
from lockgate.standalone.supervisor import Supervisor

__all__ = ["main"]


async def _main(arguments: argparse.Namespace) -> None:
    state = State(arguments.cluster)
    settings = msgspec.json.decode(arguments.settings, type=Settings)
    supervisor = Supervisor(state, arguments.folder, arguments.nodes, settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop.set)
    if not arguments.detached:
        # The command that started us holds the other end: the cluster ends with it.
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

        async def until_closed() -> None:
            await reader.read()
            supervisor.stop.set()

        supervisor_task = asyncio.create_task(until_closed())
        supervisor_task.add_done_callback(lambda _: None)
    await supervisor.run(serve)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lockgate supervisor")
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--detached", action="store_true")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    state = State(arguments.cluster)
    other = teardown.supervisor_pid(state)
    if other is not None and other != os.getpid():
        raise SystemExit(f"the cluster {state.cluster!r} is running already (process {other})")
    state.root.mkdir(parents=True, exist_ok=True)
    settings = {
        "cluster": state.cluster,
        "pid": os.getpid(),
        "folder": str(arguments.folder.absolute()),
    }
    state.settings.write_bytes(msgspec.json.encode(settings) + b"\n")
    try:
        asyncio.run(_main(arguments))
    finally:
        teardown.remove(state)


if __name__ == "__main__":
    main()
