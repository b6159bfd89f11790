"""The commands on the example shop: what they print, their exit codes, their JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import ROOT, Cluster, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

WIDTH = 100
ESCAPE = "\x1b"
FIELDS = {"from", "to", "port", "protocol", "verdict", "direction", "policy", "rule", "policies"}
SERVICE_PORT = 80


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shop")
    for path in (ROOT / "examples" / "shop").glob("*.yaml"):
        shutil.copy(path, folder)
    with Cluster(folder, unique_name("tc")) as cluster:
        yield cluster


def ask(cluster: Cluster, *arguments: str, code: int = 0) -> Any:
    """The JSON that a command prints."""
    done = cluster.lockgate(*arguments, "--json", check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def command(cluster: Cluster, name: str) -> list[str]:
    return [sys.executable, "-m", "lockgate.cli.main", name, "--cluster", cluster.name]


def lines(cluster: Cluster, *arguments: str) -> list[Any]:
    """The objects of a command that prints one a line."""
    return [json.loads(line) for line in cluster.lockgate(*arguments, "--json").stdout.splitlines()]


# ---- For people -------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "status",
        "wait",
        *(f"get {kind}" for kind in ("pods", "services", "endpoints", "policies", "nodes")),
        "get pods -n shop",
        "explain visitors/intruder svc/shop/cart 80",
        "explain visitors/intruder shop/web-0 8080",
        "explain shop/web-0 203.0.113.7 53/udp",
        "flows --limit 50",
        "probe -n payments --family 4",
    ],
)
def test_output_fits_the_screen_and_has_no_colour_in_a_file(shop: Cluster, line: str) -> None:
    done = shop.lockgate(*line.split(), check=False)
    assert done.returncode == (1 if "cart" in line or "203" in line else 0), done.stderr
    assert done.stdout
    assert ESCAPE not in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > WIDTH] == []


def test_a_terminal_gets_colour(shop: Cluster) -> None:
    line = " ".join(command(shop, "explain"))
    done = subprocess.run(
        ["script", "-qec", f"{line} visitors/intruder shop/web-0 8080", "/dev/null"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)},
    )
    assert f"{ESCAPE}[32m" in done.stdout


# ---- status, get --------------------------------------------------------------------


def test_status_as_json(shop: Cluster) -> None:
    found = ask(shop, "status")
    assert found["cluster"] == shop.name
    assert found["phase"] == "running"
    assert found["pods"]["total"] == found["pods"]["ready"] == len(shop.objects("pods"))
    assert found["errors"] == found["reasons"] == found["notReady"] == []
    assert [node["name"] for node in found["nodes"]] == ["node-1", "node-2"]
    for node in found["nodes"]:
        assert node["agent"]["up"] and node["observer"]["up"]
        assert node["observerStatus"]["lost"] == 0


def test_pods_as_json(shop: Cluster) -> None:
    pods = ask(shop, "get", "pods")
    assert len(pods) >= 20
    for one in pods:
        assert {"namespace", "name", "node", "ips", "labels"} <= set(one)
        assert len(one["ips"]) == 2
    [web] = [p for p in pods if (p["namespace"], p["name"]) == ("shop", "web-0")]
    assert web["labels"]["app"] == "web"
    assert web["node"] in ("node-1", "node-2")


@pytest.mark.parametrize("kind", ["pods", "services", "endpoints", "policies"])
def test_get_of_one_namespace(shop: Cluster, kind: str) -> None:
    every = ask(shop, "get", kind)
    some = ask(shop, "get", kind, "-n", "payments")
    assert some == [item for item in every if item["namespace"] == "payments"]
    assert 0 < len(some) < len(every)
    assert ask(shop, "get", kind, "-n", "nowhere") == []


def test_nodes_services_endpoints_and_policies_as_json(shop: Cluster) -> None:
    nodes = ask(shop, "get", "nodes")
    assert [node["name"] for node in nodes] == ["node-1", "node-2"]
    services = {(s["namespace"], s["name"]): s for s in ask(shop, "get", "services")}
    web = services["shop", "web"]
    assert web["ports"][0]["port"] == SERVICE_PORT
    assert len(web["clusterIPs"]) == 2
    assert len(web["backends"]) == 6
    slices = [s for s in ask(shop, "get", "endpoints") if s["service"] == "web"]
    assert {s["addressType"] for s in slices} == {"IPv4", "IPv6"}
    assert [len(s["endpoints"]) for s in slices] == [3, 3]
    for endpoint in slices[0]["endpoints"]:
        assert endpoint["conditions"]["ready"] is True
        assert endpoint["nodeName"] in ("node-1", "node-2")
        assert endpoint["targetRef"]["kind"] == "Pod"
        assert endpoint["targetRef"]["name"].startswith("web-")
    policies = {(p["namespace"], p["name"]): p for p in ask(shop, "get", "policies")}
    assert policies["shop", "default-deny"]["policyTypes"] == ["Ingress", "Egress"]


# ---- exec ------------------------------------------------------------------------


def test_exec_gives_the_exit_code_and_both_outputs(shop: Cluster) -> None:
    script = "echo out; echo err >&2; exit 7"
    done = shop.lockgate("exec", "shop/web-0", "--", "sh", "-c", script, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_exec_passes_standard_input(shop: Cluster) -> None:
    done = subprocess.run(
        [*command(shop, "exec"), "shop/web-0", "--", "wc", "-c"],
        input="x" * 100_000,
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "100000")


@pytest.mark.parametrize(
    ("pod", "command", "code", "words"),
    [
        ("shop/nobody", "true", 1, "there is no pod shop/nobody"),
        ("shop/web-0", "no-such-command", 127, "no-such-command"),
    ],
)
def test_exec_says_what_is_not_there(
    shop: Cluster, pod: str, command: str, code: int, words: str
) -> None:
    done = shop.lockgate("exec", pod, "--", command, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_exec_runs_in_the_pods_network(shop: Cluster) -> None:
    done = shop.lockgate("exec", "shop/web-0", "--", "ip", "-j", "addr", "show", "eth0")
    found = {a["local"] for link in json.loads(done.stdout) for a in link["addr_info"]}
    assert set(shop.pod("shop/web-0").ips) <= found


# ---- explain ------------------------------------------------------------------------


def one(answer: Any) -> dict[str, Any]:
    [only] = answer
    assert isinstance(only, dict)
    return only


POLICY_KEYS = {"kind", "namespace", "name", "rules"}


@pytest.mark.parametrize("engine", ["kernel", "spec"])
@pytest.mark.parametrize(
    ("source", "target", "port", "verdict", "direction", "policy", "rule"),
    [
        ("visitors/customer", "shop/web-0", "8080", "allow", "ingress", "shop/web", "ingress[0]"),
        ("visitors/customer", "svc/shop/web", "80", "allow", "ingress", "shop/web", "ingress[0]"),
        ("visitors/customer", "shop/web", "80", "allow", "ingress", "shop/web", "ingress[0]"),
        ("visitors/intruder", "svc/shop/cart", "80", "deny", "ingress", None, None),
        ("shop/web-0", "8.8.8.8", "53/udp", "deny", "egress", None, None),
        ("203.0.113.9", "shop/web-0", "8080/tcp", "allow", "ingress", "shop/web", "ingress[0]"),
        ("visitors/customer", "203.0.113.9", "443", "allow", None, None, None),
        ("shop/web-0", "shop/web-0", "1", "allow", None, None, None),
    ],
)
def test_explain_names_the_policy_and_the_rule(
    shop: Cluster,
    engine: str,
    source: str,
    target: str,
    port: str,
    verdict: str,
    direction: str | None,
    policy: str | None,
    rule: str | None,
) -> None:
    code = 0 if verdict == "allow" else 1
    arguments = ["explain", source, target, port, "--engine", engine]
    answer = one(ask(shop, *arguments, code=code))
    assert set(answer) - {"cause", "backend"} == FIELDS
    assert (answer["from"], answer["to"]) == (source, target)
    assert (answer["port"], answer["protocol"]) == (
        int(port.partition("/")[0]),
        (port.partition("/")[2] or "tcp").upper(),
    )
    assert (answer["verdict"], answer["direction"], answer["rule"]) == (verdict, direction, rule)
    if policy:
        namespace, _, name = policy.partition("/")
        assert answer["policy"] == {"kind": "NetworkPolicy", "namespace": namespace, "name": name}
        assert rule in answer["policies"][0]["rules"]
    elif direction is None:
        assert answer["policy"] is None
        assert answer["policies"] == []
    else:
        assert all(set(entry) == POLICY_KEYS and not entry["rules"] for entry in answer["policies"])
        assert len(answer["policies"]) >= 2


def test_both_ends_as_addresses_of_either_family(shop: Cluster) -> None:
    client, server = shop.pod("visitors/customer"), shop.pod("shop/web-0")
    for family in (4, 6):
        answer = one(ask(shop, "explain", client.ip(family), server.ip(family), "8080"))
        assert answer["policy"]["name"] == "web"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("shop/nobody shop/web-0 80", "no pod or service shop/nobody"),
        ("shop/web-0 svc/shop/nobody 80", "no service shop/nobody"),
        ("shop/web-0 shop/web-1 0", "expected PORT[/PROTO], the port from 1 to 65535"),
        ("shop/web-0 shop/web-1 80/foo", "tcp, udp, sctp or icmp"),
        ("shop/web-0 somewhere 80", "somewhere: expected NAMESPACE/POD"),
        ("shop/web-0 fd00::1", "give FROM, TO and PORT[/PROTO], or --batch FILE"),
        ("--batch /no/such/file", "/no/such/file"),
        ("10.244.1.3 fd00::1 80", ""),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_sentence(
    shop: Cluster, arguments: str, words: str
) -> None:
    done = shop.lockgate("explain", *arguments.split(), check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("engine", ["kernel", "spec"])
@pytest.mark.parametrize("of", ["itself", "its node"])
def test_what_is_not_judged_is_not_said_to_have_no_policy(
    shop: Cluster, of: str, engine: str
) -> None:
    """Policies select vault-0, in both directions; they are not asked."""
    pod = shop.pod("payments/vault-0")
    name = "payments/vault-0"
    [node] = [n for n in shop.objects("nodes") if n["metadata"]["name"] == pod.node]
    own = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")
    source, why = {
        "itself": (name, "not judged: a pod may always reach itself"),
        "its node": (own, "not judged: a node may always reach its own pods"),
    }[of]
    told = shop.lockgate("explain", source, name, "8200", "--engine", engine).stdout
    assert f"allow  {why}\n" in told
    assert f"of {name}: {why}\n" in told
    assert f"of {name}: no policy applies" not in told


def all_questions(cluster: Cluster) -> list[dict[str, Any]]:
    """Every pod, address outside and service to every pod and service, on ports that matter."""
    pods = [
        "/".join((p["metadata"]["namespace"], p["metadata"]["name"]))
        for p in cluster.objects("pods")
    ]
    sources = [*pods, "203.0.113.7", "172.31.0.1", "2001:db8::7", "172.30.0.11"]
    ports = [(80, "TCP"), (443, "TCP"), (5432, "TCP"), (7000, "TCP"), (7100, "TCP")]
    ports += [(8000, "TCP"), (8080, "TCP"), (8200, "TCP"), (8443, "TCP"), (9090, "TCP")]
    ports += [(9100, "TCP"), (53, "UDP"), (5353, "UDP"), (5353, "TCP"), (80, "SCTP")]
    services = [
        f"svc/{s['metadata']['namespace']}/{s['metadata']['name']}"
        for s in cluster.objects("services")
    ]
    return [
        {"from": source, "to": target, "port": port, "protocol": protocol}
        for source in sources
        for target in [*pods, *services, "203.0.113.9", "172.30.0.12"]
        for port, protocol in ports
        if not (source[0].isdigit() and target[0].isdigit())
    ]


def batch(cluster: Cluster, file: Path, engine: str) -> list[dict[str, Any]]:
    done = cluster.lockgate("explain", "--batch", str(file), "--engine", engine, check=False)
    assert done.returncode in (0, 2), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_both_engines_agree_on_every_question_about_the_shop(shop: Cluster, tmp_path: Path) -> None:
    questions = all_questions(shop)
    assert len(questions) >= 10_000
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    kernel, spec = batch(shop, file, "kernel"), batch(shop, file, "spec")
    assert len(kernel) == len(spec) == len(questions)
    differing = [
        (question, mine, theirs)
        for question, mine, theirs in zip(questions, kernel, spec, strict=True)
        if mine != theirs
    ]
    assert not differing, f"{len(differing)} differ, the first: {differing[0]}"
    verdicts = [answer["verdict"] for answer in kernel]
    assert verdicts.count("allow") > 1000
    assert verdicts.count("deny") > 1000


def test_batch_answers_bad_lines_in_their_place(shop: Cluster) -> None:
    text = '{"from":"shop/web-0","to":"shop/cart-0","port":8000}\n\nnot json\n{"from":"x"}\n'
    done = subprocess.run(
        [*command(shop, "explain"), "--batch", "-"],
        input=text,
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["verdict"] for answer in answers] == ["allow", None, None]
    assert answers[1]["error"].startswith("line 3: ")
    assert answers[2]["error"].startswith("line 4: ")


# ---- flows -----------------------------------------------------------------------

CONNECT = (
    "import socket,sys\n"
    "for port in sys.argv[2:]:\n"
    "    try: socket.create_connection((sys.argv[1], int(port)), 0.05).close()\n"
    "    except OSError: pass\n"
    "s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'?', (sys.argv[1], 8080))\n"
)


@pytest.fixture(scope="module")
def talk(shop: Cluster) -> list[dict[str, Any]]:
    """A visitor's connection that is allowed, one that is denied, and a datagram."""
    target = shop.pod("shop/web-1").ip()
    python = ["python3", "-c", CONNECT, target, "8080", "9100"]
    shop.lockgate("exec", "visitors/intruder", "--", *python)

    def records() -> list[dict[str, Any]]:
        found = lines(shop, "flows", "--pod", "visitors/intruder", "--limit", "1000")
        mine = [r for r in found if r["destination"].get("pod") == "web-1"]
        return mine if {r["protocol"] for r in mine} == {"TCP", "UDP"} else []

    return until(records, "the flows of visitors/intruder")


def test_a_flow_record_has_the_fields_of_the_api(talk: list[dict[str, Any]]) -> None:
    [denied] = [r for r in talk if r["destination"]["port"] == 9100 and r["verdict"] == "deny"][:1]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", denied["time"])
    assert (denied["direction"], denied["protocol"]) == ("ingress", "TCP")
    assert denied["source"]["namespace"] == "visitors"
    assert denied["source"]["pod"] == "intruder"
    assert denied["destination"]["namespace"] == "shop"
    assert denied["tcpFlags"] == ["SYN"]
    assert denied["policy"]["kind"] == "NetworkPolicy"
    assert denied["rule"] is None
    assert {p["name"] for p in denied["policies"]} >= {"default-deny", "web"}
    [allowed] = [
        r
        for r in talk
        if r["destination"]["port"] == 8080
        and r["protocol"] == "TCP"
        and r["direction"] == "ingress"
    ][:1]
    assert (allowed["verdict"], allowed["rule"]) == ("allow", "ingress[0]")
    assert allowed["policy"] == {"kind": "NetworkPolicy", "namespace": "shop", "name": "web"}


@pytest.mark.parametrize(
    ("arguments", "keeps"),
    [
        (["--verdict", "deny"], lambda r: r["verdict"] == "deny"),
        (["--verdict", "allow"], lambda r: r["verdict"] == "allow"),
        (["-n", "visitors"], lambda r: "visitors" in _ends(r, "namespace")),
        (["--pod", "intruder"], lambda r: "intruder" in _ends(r, "pod")),
        (["--pod", "shop/web-1"], lambda r: "web-1" in _ends(r, "pod")),
        (
            ["--policy", "shop/default-deny"],
            lambda r: (
                ("shop", "default-deny") in [(p["namespace"], p["name"]) for p in r["policies"]]
            ),
        ),
        (["--cause", "policy"], lambda r: r["cause"] == "policy"),
        (["--direction", "ingress"], lambda r: r["direction"] == "ingress"),
        (["--port", "9100"], lambda r: r["destination"]["port"] == 9100),
        (["--protocol", "udp"], lambda r: r["protocol"] == "UDP"),
        (["--since", "10m"], lambda r: True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_filter_keeps_what_fits(
    shop: Cluster, talk: list[dict[str, Any]], arguments: list[str], keeps: Any
) -> None:
    found = lines(shop, "flows", "--limit", "5000", *arguments)
    assert found
    assert all(map(keeps, found))
    missing = [record for record in talk if keeps(record) and record not in found]
    assert missing == []


def _ends(record: dict[str, Any], key: str) -> list[Any]:
    return [record["source"].get(key), record["destination"].get(key)]


def test_the_limit_keeps_the_newest(shop: Cluster, talk: list[dict[str, Any]]) -> None:
    every = lines(shop, "flows", "--limit", "5000", "--pod", "visitors/intruder")
    last = lines(shop, "flows", "--limit", "2", "--pod", "visitors/intruder")
    assert len(last) == 2
    assert last[1]["time"] >= every[-1]["time"]  # the visitor goes on
    assert lines(shop, "flows", "--since", "2099-01-01T00:00:00Z") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verdict", "maybe"], "maybe"),
        (["--cause", "because"], "cause: expected one of"),
        (["--since", "yesterday"], "since: expected 30s, 5m, 2h or an RFC 3339 time"),
        (["--port", "70000"], "70000"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(
    shop: Cluster, arguments: list[str], words: str
) -> None:
    done = shop.lockgate("flows", *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stderr


def test_follow_prints_records_as_they_come(shop: Cluster) -> None:
    target = shop.pod("shop/db-0").ip()
    process = subprocess.Popen(
        [*command(shop, "flows"), "-f", "--json", "--verdict", "deny", "--port", "5432"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        python = ["python3", "-c", CONNECT, target, "5432"]
        shop.lockgate("exec", "visitors/customer", "--", *python)
        assert process.stdout
        record = json.loads(process.stdout.readline())
        assert (record["verdict"], record["destination"]["port"]) == ("deny", 5432)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)  # a pipe that nobody reads would keep it
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


# ---- probe ------------------------------------------------------------------------


def test_probe_measures_what_the_policies_mean(shop: Cluster) -> None:
    checks = ask(shop, "probe", "-n", "payments")
    assert len(checks) > 100
    assert all(check["difference"] is None for check in checks)
    assert {check["family"] for check in checks} == {"IPv4", "IPv6"}
    assert {check["measured"] for check in checks} >= {"allow", "deny"}
    for check in checks:
        assert "payments" in check["from"] + check["to"]


def test_a_stopped_server_is_shown_but_is_no_difference_of_policy(shop: Cluster) -> None:
    members = (shop.pod("payments/vault-0").cgroup / "cgroup.procs").read_text().split()
    for number in members:
        os.kill(int(number), signal.SIGSTOP)
    try:
        arguments = ["probe", "-n", "payments", "--family", "4", "--timeout", "0.3"]
        done = shop.lockgate(*arguments, check=False)
        checks = ask(shop, *arguments)
    finally:
        for number in members:
            os.kill(int(number), signal.SIGCONT)
    # A stopped pod cannot ask either: only what is asked of it counts here.
    assert "nothing answered (timeout connected)" in done.stdout
    assert done.returncode == 0, done.stdout
    silent = [check for check in checks if check["unanswered"]]
    assert silent
    assert {check["to"] for check in silent} <= {"payments/vault-0", "svc/payments/vault"}
    assert all(check["measured"] == "allow" and check["difference"] is None for check in silent)


def test_probe_fails_when_nobody_denied_what_should_have_been_denied(shop: Cluster) -> None:
    """The pod's own filter swallows what policies would deny: the silence proves nothing."""
    pod = shop.bare(shop.pod("payments/vault-1"))
    rules = "table inet test { chain o { type filter hook output priority 0; drop; }; }"
    pod.run("nft", "-f", "-", input=rules)
    try:
        arguments = ["probe", "-n", "payments", "--family", "4", "--timeout", "0.2"]
        done = shop.lockgate(*arguments, check=False)
        assert done.returncode == 1, done.stdout
        assert "expected deny: no answer, but nobody denied it" in done.stdout
    finally:
        pod.run("nft", "delete", "table", "inet", "test")


def test_a_denied_connection_names_who_denied_it(shop: Cluster) -> None:
    checks = ask(shop, "probe", "-n", "payments", "--family", "4")
    silent = [check for check in checks if check["expected"] == "deny"]
    assert silent
    for check in silent:
        by = check["policy"]
        assert check["denial"].startswith(f"denied by {by['namespace']}/"), check
        assert check["direction"] in check["denial"], check


def test_probe_fails_when_a_packet_filter_of_somebody_else_denies(shop: Cluster) -> None:
    pod = shop.bare(shop.pod("payments/vault-1"))
    rules = (
        "table inet test { chain i { type filter hook input priority 0; tcp dport 8200 drop; }; }"
    )
    pod.run("nft", "-f", "-", input=rules)
    try:
        arguments = ["probe", "-n", "payments", "--family", "4", "--timeout", "0.2"]
        done = shop.lockgate(*arguments, check=False)
        assert done.returncode == 1, done.stdout
        assert "differ from the specification" in done.stdout
        told = r"expected allow, measured deny \(timeout\): allowed on (node-1|node-1 and node-2)"
        text = " ".join(done.stdout.split())
        assert re.search(f"{told}, but the server did not answer", text), done.stdout
        assert "✗" in done.stdout
        assert [line for line in done.stdout.splitlines() if len(line) > WIDTH] == []
    finally:
        pod.run("nft", "delete", "table", "inet", "test")
