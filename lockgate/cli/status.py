"""`lockgate status`: one screen that tells whether all is well, and what is not."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from lockgate import __version__
from lockgate.access import ROLES, Access, Refused
from lockgate.cli.common import access_options, fail_unanswered, json_option, not_ready, print_json
from lockgate.cli.render import paint, table

__all__ = [
    "api_cost",
    "firewall_lines",
    "gather",
    "problems",
    "process_state",
    "status",
    "xdp_lines",
]

Row = dict[str, Any]
_AT_ONCE = 32
_PATIENCE = 10  # seconds
#: Nobody sends such packets on purpose; what else is dropped is policy, or a misbehaving pod.
_FAULTS = {
    "not-ready": "packets came before anything was in force",
    "nat-exhausted": "no source port was left for masquerade: too many connections to one address",
    "nat-failed": "addresses could not be translated",
    "endpoint-gone": "packets were for pods that are no more",
    "new-connection-rate": "a pod began more connections a second than it may",
    "fragment-rate": "a pod sent or got more packets in fragments a second than it may",
    "fragment-untracked": "parts of a packet came without its first",
}
_LOST_SHARE = 0.001
_UNUSED = "nothing needs it"
_MUCH = 1 << 30  # bytes of an agent's or observer's memory


@click.command()
@json_option
@access_options
def status(as_json: bool, access: Access) -> None:
    """Say whether the cluster and each of its nodes is well, and what is not.

    Exit codes: 0 all is well, 1 something is not, 2 no such cluster.
    """
    try:
        found = gather(access)
    except (OSError, Refused) as error:
        fail_unanswered(access, error)
    found["problems"] = problems(found)
    if as_json:
        print_json(found)
    else:
        _print(found, access)
    raise SystemExit(1 if found["problems"] else 0)


def gather(access: Access) -> Row:
    """What the cluster tells of itself, and each agent and observer of theirs. Raises Refused
    or OSError when the cluster does not answer; a node that does not has an "error"."""
    found = access.status()

    def ask(asked: tuple[Row, str]) -> None:
        node, role = asked
        try:
            told = access.call(node["name"], role, "GET", "/v1/status", timeout=_PATIENCE)  # type: ignore[arg-type]
        except TimeoutError:
            told = {"error": f"nothing came within {_PATIENCE} s"}
        except (FileNotFoundError, ConnectionRefusedError):
            told = {"error": "it is starting", "starting": True}
        except (OSError, Refused, ValueError) as error:
            told = {"error": str(error)}
        node[f"{role}Status"] = told

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(ask, [(node, role) for node in found["nodes"] for role in ROLES]))
    return found


def problems(found: Row) -> list[Row]:
    """What is not well, as {"node", "text"}; node "" is the cluster. Pure: of what `gather`
    returned."""
    told = [("", text) for text in (*found["errors"], *found["reasons"])]
    told += [("", f"not ready: {text}") for text in not_ready(found)]
    if not found["nodes"]:
        told.append(("", "there are no nodes"))
    for node in found["nodes"]:
        told += [(node["name"], text) for text in _node_problems(node, found.get("revision"))]
    unique = dict.fromkeys(told)
    return [{"node": node, "text": text} for node, text in unique]


def _node_problems(node: Row, revision: int | None) -> list[str]:
    if node.get("missing"):
        return [node["error"]]
    texts = [node["error"]] if node["error"] else []
    for role in ROLES:
        process, told = node.get(role) or {}, node[f"{role}Status"]
        if not process.get("up"):
            reason = process.get("error") or "it does not run"
            texts.append(f"{role} is down: {reason}")
        elif "error" in told and "node" not in told:
            texts.append(f"{role} does not answer: {told['error']}")
        elif told.get("error"):
            texts.append(f"{role}: {told['error']}")
        if told.get("version", __version__) != __version__:
            texts.append(f"{role} is version {told['version']}, this command {__version__}")
        if told.get("memory", 0) > _MUCH:
            texts.append(f"{role} has {_size(told['memory'])} of memory")
    agent, observer = node["agentStatus"], node["observerStatus"]
    if "node" in agent:
        texts += _agent_problems(agent, revision)
    if "node" in observer:
        texts += _observer_problems(observer)
    return texts


def _agent_problems(agent: Row, revision: int | None) -> list[str]:
    texts = list(agent["errors"])
    if not agent["applied"]:
        texts.append("nothing is in force yet")
    elif behind := max(revision or 0, agent["revision"]) - agent["applied"]:
        texts.append(f"{behind} changes are not in force yet")
    if not agent["connected"] and not agent["errors"]:
        texts.append("the source of objects is away: what was in force stays")
    texts += [
        f"the kernel lacks {one['name']}: {one['advice']}"
        for one in agent["features"]
        if not one["ok"]
    ]
    for cause, count in agent["drops"].items():
        if cause in _FAULTS:
            texts.append(f"{_count(count, 'packet')} dropped, {cause}: {_FAULTS[cause]}")
    return texts


def _observer_problems(observer: Row) -> list[str]:
    texts = []
    if not observer["ready"]:
        texts.append("observer does not read events yet")
    lost, events = observer.get("lost", 0), observer.get("events", 0)
    if lost > _LOST_SHARE * (lost + events):
        texts.append(f"{lost} of {lost + events} flow records were lost: they came too fast")
    if observer.get("cut"):
        texts.append(f"{_count(observer['cut'], 'flow record')} left out: a pod caused too many")
    if observer.get("journalDamaged"):
        texts.append(f"{_count(observer['journalDamaged'], 'line')} of the journal damaged")
    return texts


# ---- On the screen ---------------------------------------------------------------


def _print(found: Row, access: Access) -> None:
    pods = found["pods"]
    if access.standalone:
        where = f"({found['phase']}), revision {found['revision']}, from {found['folder']}"
    else:
        where = f"at {found['folder']}"
    click.echo(f"{access.title} {where}")
    click.echo(
        f"pods: {pods['total']}, {pods['ready']} ready, {pods['running']} running, "
        f"{pods['failed']} failed\n"
    )
    head = ["NODE", "AGENT", "VERSION", "SINCE", "IN FORCE", "PODS", "MEMORY", "OBSERVER", "EVENTS"]
    head += ["LOST", "MEMORY"]
    click.echo(table(head, [_line(node) for node in found["nodes"]]))
    cost = api_cost(found["nodes"])
    if cost:
        click.echo(f"\n{cost}")
    for line in (*xdp_lines(found["nodes"]), *firewall_lines(found["nodes"])):
        click.echo(f"\n{line}")
    drops: dict[str, int] = {}
    for node in found["nodes"]:
        for cause, count in node["agentStatus"].get("drops", {}).items():
            drops[cause] = drops.get(cause, 0) + count
    if drops:
        ordered = sorted(drops.items(), key=lambda one: -one[1])
        click.echo(
            "\npackets dropped: " + ", ".join(f"{count} {cause}" for cause, count in ordered)
        )
    for text in found["warnings"]:
        click.echo(f"warning: {text}")
    click.echo("")
    if not found["problems"]:
        click.echo(paint("All is well.", "green"))
    for one in found["problems"]:
        where = f"node {one['node']}: " if one["node"] else ""
        click.echo(paint("✗", "red", bold=True) + f" {where}{one['text']}")


def api_cost(nodes: list[Row]) -> str:
    """What following the API server costs it, in one line; "" where nobody does."""
    rates = {
        node["name"]: sum(one.get("bytesPerSecond", 0) for one in kinds.values())
        for node in nodes
        if (kinds := node["agentStatus"].get("api", {}).get("kinds"))
    }
    if not rates:
        return ""
    most = max(rates, key=lambda name: rates[name])
    told = f"the API server sends agents {_rate(sum(rates.values()))}"
    if len(rates) > 1:
        told += f", {_rate(rates[most])} of it to {most}"
    return told + " (average of a minute)"


def xdp_lines(nodes: list[Row]) -> list[str]:
    """How XDP runs, one line for all nodes where it is the same; nothing where nothing needs it."""
    alike: dict[str, list[str]] = {}
    for node in nodes:
        cards = node["agentStatus"].get("xdp", ())
        if any(one["why"] != _UNUSED for one in cards):
            told = [
                f"{one['card']} {one['mode']}" + (f" ({one['why']})" if one["why"] else "")
                for one in cards
            ]
            alike.setdefault(", ".join(told), []).append(node["name"])
    return [
        f"XDP on {', '.join(names) if len(names) < len(nodes) else 'all nodes'}: {text}"
        for text, names in alike.items()
    ]


def firewall_lines(nodes: list[Row]) -> list[str]:
    """What the firewall has, one line for all nodes where it is the same; nothing where there is
    none."""
    alike: dict[str, list[str]] = {}
    for node in nodes:
        one = node["agentStatus"].get("firewall")
        if one:
            rules = f"{one['rules']} rule{'s' * (one['rules'] != 1)}"
            text = f"{one['entries']} entries by {rules}, default {one['default']}"
            alike.setdefault(text, []).append(node["name"])
    return [
        f"firewall on {', '.join(names) if len(names) < len(nodes) else 'all nodes'}: {text}"
        for text, names in alike.items()
    ]


def _rate(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B/s"
    return f"{count / 1e3:.1f} kB/s" if count < 1e6 else f"{count / 1e6:.1f} MB/s"


def _line(node: Row) -> list[str]:
    agent, observer = node["agentStatus"], node["observerStatus"]
    return [
        node["name"],
        process_state(node.get("agent") or {}, agent),
        str(agent.get("version", "-")),
        _age(agent["started"]) if "started" in agent else "-",
        f"{agent.get('applied', '-')} of {agent.get('revision', '-')}",
        str(agent.get("counts", {}).get("endpoints", "-")),
        _size(agent["memory"]) if "memory" in agent else "-",
        process_state(node.get("observer") or {}, observer),
        str(observer.get("events", "-")),
        str(observer["lost"] + observer.get("cut", 0) if "lost" in observer else "-"),
        _size(observer["memory"]) if "memory" in observer else "-",
    ]


def process_state(child: Row, told: Row) -> str:
    """`up` once it answers, and what it is until then."""
    if not child.get("up"):
        return "down"
    restarts = child.get("restarts", 0)
    how = "up" if "node" in told else "starting" if told.get("starting") else "no answer"
    return how + (f", {_count(restarts, 'restart')}" if restarts else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _age(since: float) -> str:
    """The largest unit that fits: 40s, 5m, 3h, 12d."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
