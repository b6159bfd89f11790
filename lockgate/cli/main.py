"""The click group. Commands are imported when they are called: `lockgate --help` stays fast.

A new command is one line in COMMANDS; its module holds a click command of that name.
"""

from __future__ import annotations

from importlib import import_module

import click

from lockgate import __version__
from lockgate.cli.plugin import called_as_plugin

__all__ = ["cli", "main"]

# name → (module:attribute, short help). The order is that of `lockgate --help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("lockgate.cli.up:up", "Run a cluster from a folder of manifests."),
    "down": ("lockgate.cli.down:down", "Remove every trace of a cluster."),
    "wait": ("lockgate.cli.wait:wait", "Wait until everything saved is in force."),
    "exec": ("lockgate.cli.exec:exec_", "Run a command in a pod."),
    "status": ("lockgate.cli.status:status", "Say whether all is well, and what is not."),
    "get": ("lockgate.cli.views:get", "List pods, services, endpoints, policies or nodes."),
    "flows": ("lockgate.cli.flows:flows", "Show connections with their verdicts and rules."),
    "firewall": (
        "lockgate.cli.firewall:firewall",
        "Allow and deny sources at nodes' cards; list what was hit.",
    ),
    "doctor": (
        "lockgate.cli.doctor:doctor",
        "Try every way, find what stands in it, say what to do.",
    ),
    "bugreport": (
        "lockgate.cli.bugreport:bugreport",
        "Pack what a maintainer needs, without secrets.",
    ),
    "uninstall": ("lockgate.cli.uninstall:uninstall", "Leave a node as it was before Lockgate."),
    "service": ("lockgate.cli.service:service", "List, show and trace services."),
    "explain": ("lockgate.cli.explain:explain", "Say whether FROM may reach TO, and who decides."),
    "probe": ("lockgate.cli.probe:probe", "Try every pair of pods; compare with the policies."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lockgate")
def cli() -> None:
    """A Kubernetes data plane in the kernel that names the rule behind every verdict."""


def main() -> None:
    cli(prog_name="kubectl lockgate" if called_as_plugin() else "lockgate")


if __name__ == "__main__":
    main()
