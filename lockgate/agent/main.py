"""python -m lockgate.agent --config FILE.json: the agent of one node as a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

from aiohttp import web

from lockgate.agent.agent import Agent
from lockgate.agent.api import application
from lockgate.agent.cni import CniServer
from lockgate.agent.config import Config, listen, read
from lockgate.agent.needs import require
from lockgate.agent.web import application as pages_of
from lockgate.bpf.features import Feature, MissingFeature
from lockgate.bpf.object import LoadError
from lockgate.net.namespaces import enter

__all__ = ["main"]

log = logging.getLogger("lockgate.agent")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 1 with one sentence when it can't start."""
    parser = argparse.ArgumentParser(prog="lockgate.agent", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="JSON, see lockgate/agent/config.py"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        config = read(options.config)
        features = require()
        path = config.netns_path
        if path is not None:
            # Before any thread is made: threads inherit the namespace of their maker.
            enter(path)
        asyncio.run(_serve(config, features))
    except (OSError, ValueError, LoadError, MissingFeature) as error:
        print(f"agent: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(config: Config, features: list[Feature]) -> None:
    agent = Agent(config, features)
    await agent.start()
    runner = web.AppRunner(application(agent), access_log=None, shutdown_timeout=1)
    await runner.setup()
    socket = config.socket
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    await web.UnixSite(runner, str(socket)).start()
    pages = web.AppRunner(pages_of(agent), access_log=None, shutdown_timeout=1)
    await pages.setup()
    if config.web:
        host, port = listen(config.web)
        await web.TCPSite(pages, host or None, port).start()
    cni = CniServer(agent, socket.with_name("cni.sock"))
    cni.start()
    log.info("node %s: epoch %d taken over", config.node, agent.publisher.epoch)
    running = asyncio.create_task(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        await pages.cleanup()
        await cni.close()
        await runner.cleanup()
        await agent.close()
