"""`python -m lockgate.observer --config FILE`: one node's observer."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from lockgate.bpf.btf import BtfError, Schema
from lockgate.observer.config import read
from lockgate.observer.server import run
from lockgate.paths import bpf_object


def main() -> int:
    parser = argparse.ArgumentParser(prog="lockgate.observer", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="JSON, see lockgate/observer/config.py"
    )
    path = parser.parse_args().config
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = read(path)
        schema = Schema.from_object(bpf_object())
    except (OSError, ValueError, BtfError) as error:
        print(f"lockgate observer: {error}", file=sys.stderr)
        return 2
    asyncio.run(run(config, schema))
    return 0


if __name__ == "__main__":
    sys.exit(main())
