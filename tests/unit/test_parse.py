"""Manifests in, objects or one clear sentence out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lockgate.objects.errors import ManifestError
from lockgate.objects.model import Namespace, NetworkPolicy, Node, Pod, Service, Workload
from lockgate.objects.parse import merge, parse

META = "metadata: {name: x}"
POD = f"apiVersion: v1\nkind: Pod\n{META}\nspec: {{containers: [{{name: c, image: i}}]}}\n"
POLICY = f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n{META}\nspec: "
SERVICE = f"apiVersion: v1\nkind: Service\n{META}\nspec: "
BALANCER = f"{SERVICE}{{type: LoadBalancer, "
DEPLOYMENT = f"apiVersion: apps/v1\nkind: Deployment\n{META}\nspec: "
SLICE = f"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{META}\n"
NODE = f"apiVersion: v1\nkind: Node\n{META}\nspec: "


def pod(container: str = "", spec: str = "", meta: str = "name: x") -> str:
    return (
        f"apiVersion: v1\nkind: Pod\nmetadata: {{{meta}}}\n"
        f"spec: {{{spec + ', ' if spec else ''}containers: [{{name: c, {container}}}]}}"
    )


def ingress(rule: str) -> str:
    return f"{POLICY}{{podSelector: {{}}, ingress: [{{{rule}}}]}}"


P = "f.yaml, document 1 (NetworkPolicy default/x), field spec.ingress[0]"
S = "f.yaml, document 1 (Service default/x), field spec"
C = "f.yaml, document 1 (Pod default/x), field spec.containers[0]"
M = "f.yaml, document 1 (Pod default/x), field metadata"

BAD = [
    # Text
    ("a: [", "f.yaml, document 1, line 2, column 1: expected valid YAML, got: "),
    ("a: 1\nb: c: d", "f.yaml, document 1, line 2, column 5: expected valid YAML, got: mapping"),
    (POD + "---\na: }", "f.yaml, document 2, line 6, column 4: expected valid YAML"),
    ("a: 1\na: 2", 'line 2, column 1: expected valid YAML, got: the key "a" twice in one object'),
    ('{"a": 1, "a": 2}', 'f.yaml, document 1, field a: expected each key once in an object'),
    (b"\xff", "f.yaml: expected UTF-8 text, got byte 0 = 0xff"),
    ("\x00", "f.yaml: expected valid YAML, got a character that YAML forbids, at position 0"),
    ("[" * 100_000, "f.yaml: expected values nested at most 100 deep"),
    ("- " * 100_000, "f.yaml: expected values nested at most 100 deep"),
    ('{"a":' * 100_000, "f.yaml: expected values nested at most 100 deep"),
    ("&x {a: *x}", "f.yaml, document 1: expected values nested at most 100 deep"),
    (("[\n---a, " * 100_000), "f.yaml: expected values nested at most 100 deep"),
    # What it is
    ("just text", 'f.yaml, document 1, field (top): expected an object, got "just text"'),
    ("- a", "f.yaml, document 1, field (top): expected an object, got a list"),
    ("kind: Pod", "(Pod default/without a name), field apiVersion: expected a string"),
    ("apiVersion: v1", "(no kind), field kind: expected a string that is not empty, got null"),
    ("apiVersion: v1\nkind: Pod", "field metadata: expected an object with a name, got null"),
    ("apiVersion: v1\nkind: Pod\nmetadata: {}", "field metadata.name: expected a name, got null"),
    (POD.replace("v1", "v2"), "(Pod default/x), field apiVersion: expected v1, got \"v2\""),
    (POLICY.replace("networking.k8s.io/v1", "extensions/v1beta1"),
     'field apiVersion: expected networking.k8s.io/v1, got "extensions/v1beta1"'),
    ("apiVersion: v1\nkind: List\nitems: 3", "field items: expected a list, got the number 3"),
    ("apiVersion: v1\nkind: List\nitems: [3]", "field items[0]: expected an object"),
    ("apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Pod, metadata: {name: _}}]",
     "f.yaml, document 1 (Pod default/_), field items[0]."),
    # Names and labels
    (pod(meta="name: X"), f'{M}.name: expected a DNS name (at most 253 lower case'.replace(
        "default/x", "default/X")),
    (pod(meta="name: 7"), "field metadata.name: expected a string (put the value in quotes), got"),
    (pod(meta="name: x, namespace: a.b"), "(Pod a.b/x), field metadata.namespace: expected a DNS"),
    ("apiVersion: v1\nkind: Namespace\nmetadata: {name: x, namespace: y}",
     "field metadata.namespace: expected none, as a Namespace is in no namespace, got \"y\""),
    ("apiVersion: v1\nkind: Namespace\nmetadata: {name: x.y}", "field metadata.name: expected a DNS"
     " label"),
    (SERVICE.replace("name: x", "name: 1x"), "field metadata.name: expected a service name"),
    (pod(meta="name: x, labels: {a: yes}"),
     f"{M}.labels[a]: expected a string (put the value in quotes), got the boolean true"),
    (pod(meta="name: x, labels: {a: 1.5}"), f"{M}.labels[a]: expected a string (put the value in"
     " quotes), got the number 1.5"),
    (pod(meta="name: x, labels: {a: }"), f"{M}.labels[a]: expected a string, got null"),
    (pod(meta="name: x, labels: {1: a}"), f"{M}.labels: expected only strings as keys"),
    (pod(meta="name: x, labels: [a]"), f"{M}.labels: expected an object, got a list"),
    (pod(meta="name: x, labels: {a: -b}"), f'{M}.labels[a]: expected a label value (empty, or at'),
    (pod(meta="name: x, labels: {A.b/: b}"), f'{M}.labels: expected a label key'),
    (pod(meta="name: x, labels: {A/b: b}"), f'{M}.labels: expected a label key'),
    (pod(meta=f"name: x, labels: {{a: {'b' * 64}}}"), f'{M}.labels[a]: expected a label value'),
    (pod(meta="name: x, labels: {a: \"b\\n\"}"), '.labels[a]: expected a label value'),
    # Pods
    (POD.replace("{name: c, image: i}", ""), "field spec.containers: expected at least one"),
    (POD.replace("}]", "}, {name: c}]"), "field spec.containers[1].name: expected a value that"
     ' differs from spec.containers[0].name, got "c"'),
    (pod("ports: [{containerPort: 0}]"), f"{C}.ports[0].containerPort: expected a port number from"
     " 1 to 65535, got the number 0"),
    (pod("ports: [{containerPort: 65536}]"), f"{C}.ports[0].containerPort: expected a port number"),
    (pod("ports: [{containerPort: '80'}]"), f"{C}.ports[0].containerPort: expected a whole number,"
     ' got "80"'),
    (pod("ports: [{}]"), f"{C}.ports[0].containerPort: expected a value, as the field is required"),
    (pod("ports: [{containerPort: 80, protocol: tcp}]"), f"{C}.ports[0].protocol: expected SCTP,"
     ' TCP or UDP, got "tcp"'),
    (pod("ports: [{containerPort: 80, name: Http}]"), f"{C}.ports[0].name: expected a port name"),
    (pod("ports: [{containerPort: 80, name: a--b}]"), f"{C}.ports[0].name: expected a port name"),
    (pod("ports: [{containerPort: 80, name: sixteen-letters-}]"), "expected a port name"),
    (pod("ports: [{containerPort: 80, name: a}, {containerPort: 81, name: a}]"),
     f"{C}.ports[1].name: expected a value that differs from"),
    (pod("env: [{name: A, value: 1}]"), f"{C}.env[0].value: expected a string (put the value in"),
    (pod("readinessProbe: {httpGet: {port: 70000}}"), f"{C}.readinessProbe.httpGet.port: expected"),
    (pod("readinessProbe: {tcpSocket: {port: true}}"), f"{C}.readinessProbe.tcpSocket.port:"
     " expected a port number or name, got the boolean true"),
    (pod("readinessProbe: {httpGet: {port: 80, scheme: https}}"), f"{C}.readinessProbe.httpGet"
     '.scheme: expected HTTP or HTTPS, got "https"'),
    (pod("readinessProbe: {httpGet: {port: 80, httpHeaders: [{name: 'A B', value: x}]}}"),
     f"{C}.readinessProbe.httpGet.httpHeaders[0].name: expected the name of an HTTP header, got"
     ' "A B"'),
    (pod('readinessProbe: {httpGet: {port: 80, httpHeaders: [{name: A, value: "x\\r\\nB: y"}]}}'),
     f"{C}.readinessProbe.httpGet.httpHeaders[0].value: expected one line of text"),
    (pod("", "hostNetwork: 'yes'"), 'field spec.hostNetwork: expected true or false, got "yes"'),
    (pod("", "restartPolicy: Sometimes"), "field spec.restartPolicy: expected Always, OnFailure or"
     ' Never, got "Sometimes"'),
    (POD + "status: {podIPs: [{ip: 10.0.0.256}]}", "field status.podIPs[0].ip: expected an IP"),
    (POD + "status: {podIPs: [{ip: 10.0.0.1}, {ip: 10.0.0.2}]}", "expected at most one of each"),
    (pod("ports: [{containerPort: 80, hostPort: 70000}]"),
     f"{C}.ports[0].hostPort: expected a port number from 1 to 65535"),
    (pod("ports: [{containerPort: 80, hostPort: 80, hostIP: all}]"),
     f'{C}.ports[0].hostIP: expected an IP address, got "all"'),
    (pod("ports: [{containerPort: 80, hostPort: 80}, {containerPort: 81, hostPort: 80}]"),
     f"{C}.ports[1].hostPort: expected a value that differs from spec.containers[0].ports[0]"),
    (pod("ports: [{containerPort: 80, hostPort: 81}]", "hostNetwork: true"),
     f"{C}.ports[0].hostPort: expected the containerPort (80), as the pod is on its host's"),
    (pod(meta="name: x, annotations: {lockgate.dev/weight: '101'}"),
     f'{M}.annotations[lockgate.dev/weight]: expected per cent, from 1 to 100, got "101"'),
    (pod("", "terminationGracePeriodSeconds: -1"),
     "field spec.terminationGracePeriodSeconds: expected a number that is not negative"),
    # Workloads
    (DEPLOYMENT + "{template: {spec: {containers: [{name: c}]}}}", "field spec.selector: expected"),
    (DEPLOYMENT + "{selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: c}}, spec:"
     " {containers: [{name: c}]}}}", "(Deployment default/x), field spec.template.metadata.labels:"
     ' expected the labels that spec.selector asks for (a: b), got "c"'),
    (DEPLOYMENT + "{replicas: -1}", "field spec.replicas: expected a number that is not negative"),
    (DEPLOYMENT + "{replicas: 99999999999}", "field spec.replicas: expected a number of 32 bits"),
    (DEPLOYMENT.replace("apps/v1", "batch/v1").replace("Deployment", "Job")
     + "{template: {spec: {containers: [{name: c}]}}}",
     "field spec.template.spec.restartPolicy: expected OnFailure or Never, got \"Always\""),
    # Services
    (SERVICE + "{}", f"{S}.ports: expected at least one port"),
    (SERVICE + "{ports: [{port: 0}]}", f"{S}.ports[0].port: expected a port number"),
    (SERVICE + "{ports: [{port: 80, targetPort: '80'}]}", f"{S}.ports[0].targetPort: expected a"
     ' port number without quotes, or a port name, got "80"'),
    (SERVICE + "{ports: [{port: 80}, {port: 81}]}", f"{S}.ports[0].name: expected a name, as"),
    (SERVICE + "{ports: [{port: 80, name: a}, {port: 81, name: a}]}", f"{S}.ports[1].name:"
     " expected a value that differs from spec.ports[0].name"),
    (SERVICE + "{ports: [{port: 80, name: a}, {port: 80, name: b}]}", f"{S}.ports[1].port:"
     " expected a value that differs from spec.ports[0].port"),
    (SERVICE + "{ports: [{port: 80, protocol: 6}]}", f"{S}.ports[0].protocol: expected"),
    (SERVICE + "{type: Foo, ports: [{port: 80}]}", f"{S}.type: expected ClusterIP, NodePort,"),
    (SERVICE + "{clusterIP: 1.2.3, ports: [{port: 80}]}", f"{S}.clusterIP: expected an IP address"),
    (SERVICE + "{ports: [{port: 80, nodePort: 30000}]}", f"{S}.ports[0].nodePort: expected none"),
    (
        SERVICE + "{internalTrafficPolicy: Zone, ports: [{port: 80}]}",
        f"{S}.internalTrafficPolicy: expected Cluster or Local",
    ),
    (
        SERVICE + "{sessionAffinity: Cookie, ports: [{port: 80}]}",
        f"{S}.sessionAffinity: expected None or ClientIP",
    ),
    (
        SERVICE + "{sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}, ports: [{port: 80}]}",
        f"{S}.sessionAffinityConfig.clientIP.timeoutSeconds: expected seconds, from 1 to 86400",
    ),
    (SERVICE + "{externalIPs: [10.0.0], ports: [{port: 80}]}", f"{S}.externalIPs[0]: expected an"
     " IP address"),
    (SERVICE + "{externalIPs: [127.0.0.1], ports: [{port: 80}]}", f"{S}.externalIPs[0]: expected an"
     ' address that clients outside can reach, got "127.0.0.1"'),
    (SERVICE + "{externalTrafficPolicy: Local, ports: [{port: 80}]}",
     f"{S}.externalTrafficPolicy: expected none, as the type is ClusterIP and there are no"
     " externalIPs"),
    (SERVICE + "{type: NodePort, externalTrafficPolicy: Zone, ports: [{port: 80}]}",
     f"{S}.externalTrafficPolicy: expected Cluster or Local"),
    (SERVICE + "{type: NodePort, loadBalancerIP: 192.0.2.1, ports: [{port: 80}]}",
     f"{S}.loadBalancerIP: expected none, as the type is NodePort"),
    (SERVICE + "{type: NodePort, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]}",
     f"{S}.allocateLoadBalancerNodePorts: expected none, as the type is NodePort"),
    (BALANCER + "loadBalancerSourceRanges: [10.0.0.0], ports: [{port: 80}]}",
     f"{S}.loadBalancerSourceRanges[0]: expected a CIDR block"),
    (BALANCER + "healthCheckNodePort: 32000, ports: [{port: 80}]}",
     f"{S}.healthCheckNodePort: expected none, but for type LoadBalancer and"),
    (BALANCER + "loadBalancerClass: 'a b', ports: [{port: 80}]}",
     f"{S}.loadBalancerClass: expected a label key"),
    (BALANCER + "ports: [{port: 80, name: a, nodePort: 30000}, {port: 81, name: b, nodePort:"
     " 30000}]}", f"{S}.ports[1].nodePort: expected a value that differs from"
     " spec.ports[0].nodePort"),
    (SERVICE + "{trafficDistribution: Near, ports: [{port: 80}]}",
     f"{S}.trafficDistribution: expected PreferClose, PreferSameZone or PreferSameNode"),
    (SERVICE.replace("name: x", "name: x, annotations: {lockgate.dev/forwarding: ipip}")
     + "{ports: [{port: 80}]}", "field metadata.annotations[lockgate.dev/forwarding]: expected dsr"
     ' or snat, got "ipip"'),
    (SERVICE + "{ipFamilies: [IPv5], ports: [{port: 80}]}", f"{S}.ipFamilies[0]: expected IPv4 or"),
    (SERVICE + "{type: ExternalName}", f"{S}.externalName: expected a DNS name"),
    (SLICE + "addressType: IPv4\nendpoints: [{addresses: ['fd00::1']}]", "field"
     ' endpoints[0].addresses[0]: expected an IPv4 address, got "fd00::1"'),
    (SLICE + "endpoints: [{addresses: []}]", "field endpoints[0].addresses: expected at least one"),
    (NODE + "{podCIDRs: [10.0.0.0/33]}", "(Node x), field spec.podCIDRs[0]: expected a CIDR block"),
    # Policies
    (POLICY + "{ingres: []}", 'field spec: expected only the fields podSelector, policyTypes,'
     ' ingress, egress, got "ingres"'),
    (ingress("form: []"), f'{P}: expected only the fields from, ports, got "form"'),
    (ingress("from: {}"), f"{P}.from: expected a list, got an object"),
    (ingress("from: [{}]"), f"{P}.from[0]: expected podSelector, namespaceSelector or ipBlock"),
    (ingress("from: [{podSelector: }]"), f"{P}.from[0]: expected podSelector, namespaceSelector"),
    (ingress("from: [null]"), f"{P}.from[0]: expected an object, got null"),
    (ingress("from: [{podSelector: {}, ipBlock: {cidr: 1.2.3.4/32}}]"), f"{P}.from[0]: expected"
     " either ipBlock or selectors"),
    (ingress("from: [{podSelector: {app: web}}]"), f"{P}.from[0].podSelector: expected only the"
     ' fields matchLabels, matchExpressions, got "app"'),
    (ingress("from: [{podSelector: {matchLabels: {a: 1}}}]"),
     f"{P}.from[0].podSelector.matchLabels[a]: expected a string"),
    (ingress("from: [{ipBlock: {}}]"), f"{P}.from[0].ipBlock.cidr: expected a value"),
    (ingress("from: [{ipBlock: {cidr: 10.0.0.0}}]"), f"{P}.from[0].ipBlock.cidr: expected a CIDR"),
    (ingress("from: [{ipBlock: {cidr: 10.0.0.0/255.0.0.0}}]"), ".ipBlock.cidr: expected a CIDR"),
    (ingress("from: [{ipBlock: {cidr: 10.0.0.0/08}}]"), ".ipBlock.cidr: expected a CIDR block"),
    (ingress("from: [{ipBlock: {cidr: 010.0.0.0/8}}]"), ".ipBlock.cidr: expected a CIDR block"),
    (ingress("from: [{ipBlock: {cidr: '::ffff:10.0.0.0/104'}}]"), ".cidr: expected a CIDR block"),
    (ingress("from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]"),
     f'{P}.from[0].ipBlock.except[0]: expected a block inside 10.0.0.0/8, got "11.0.0.0/16"'),
    (ingress("from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]"), "a block inside"),
    (ingress("from: [{ipBlock: {cidr: '::/0', except: [10.0.0.0/8]}}]"), "a block inside ::/0"),
    (ingress("ports: [{port: 0}]"), f"{P}.ports[0].port: expected a port number from 1 to 65535,"
     " got the number 0"),
    (ingress("ports: [{port: 80}, {port: 70000}]"), f"{P}.ports[1].port: expected a port number"
     " from 1 to 65535, got the number 70000"),
    (ingress("ports: [{port: '80'}]"), f"{P}.ports[0].port: expected a port number without quotes"),
    (ingress("ports: [{port: 80.5}]"), f"{P}.ports[0].port: expected a port number or name, got"),
    (ingress("ports: [{port: HTTP}]"), f"{P}.ports[0].port: expected a port name (at most 15"),
    (ingress("ports: [{port: 80, endPort: 79}]"), f"{P}.ports[0].endPort: expected a number from"
     " port (80) to 65535, got the number 79"),
    (ingress("ports: [{port: 80, endPort: 65536}]"), f"{P}.ports[0].endPort: expected a number"),
    (ingress("ports: [{port: http, endPort: 80}]"), f"{P}.ports[0].endPort: expected none, as"),
    (ingress("ports: [{endPort: 80}]"), f"{P}.ports[0].endPort: expected none, as port is not a"),
    (ingress("ports: [{protocol: ICMP}]"), f"{P}.ports[0].protocol: expected SCTP, TCP or UDP"),
    (ingress("from: [{podSelector: {matchExpressions: [{key: a, operator: In}]}}]"),
     "matchExpressions[0].values: expected at least one value for In"),
    (ingress("from: [{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}"
             "]"), "matchExpressions[0].values: expected no values for Exists"),
    (ingress("from: [{podSelector: {matchExpressions: [{key: a, operator: Is}]}}]"),
     "matchExpressions[0].operator: expected DoesNotExist, Exists, In or NotIn, got \"Is\""),
    (ingress("from: [{podSelector: {matchExpressions: [{operator: Exists}]}}]"),
     "matchExpressions[0].key: expected a value, as the field is required"),
    (ingress("from: [{podSelector: {matchExpressions: [{key: a b, operator: Exists}]}}]"),
     "matchExpressions[0].key: expected a label key"),
    (POLICY + "{policyTypes: [ingress]}", "field spec.policyTypes[0]: expected Egress or Ingress"),
    (POLICY + "{policyTypes: [Ingress, Egress, Ingress]}", "field spec.policyTypes: expected at"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "fragment"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_bad_input_is_named(text: str | bytes, fragment: str) -> None:
    with pytest.raises(ManifestError) as error:
        parse(text, "f.yaml")
    message = str(error.value)
    assert fragment in message
    assert message.startswith("f.yaml")
    assert "\n" not in message and len(message) < 1000


def one(text: str) -> Any:
    (item,) = parse(text, "f.yaml").objects
    return item


def test_defaults_and_kinds() -> None:
    item = one(POD)
    assert isinstance(item, Pod) and item.key == ("default", "x")
    template = "{metadata: {labels: {a: b}}, spec: {containers: [{name: c}]}}"
    item = one(DEPLOYMENT + f"{{selector: {{matchLabels: {{a: b}}}}, template: {template}}}")
    assert isinstance(item, Workload) and (item.kind, item.spec.replicas) == ("Deployment", 1)
    item = one(SERVICE + "{ports: [{port: 80, targetPort: http}], clusterIP: None}")
    assert isinstance(item, Service) and item.cluster_ips == []
    assert one(SERVICE + "{ports: [{port: 80, targetPort: 0}]}").spec.ports[0].target_port is None
    assert isinstance(one(NODE + "{podCIDRs: [10.0.0.0/24, 'fd00::/64']}"), Node)


def test_a_namespace_carries_its_name_as_a_label() -> None:
    item = one("apiVersion: v1\nkind: Namespace\nmetadata: {name: x, labels: {a: b}}")
    assert isinstance(item, Namespace)
    assert item.metadata.labels == {"a": "b", "kubernetes.io/metadata.name": "x"}
    item = one("apiVersion: v1\nkind: Namespace\nmetadata: {name: x, namespace: ''}")
    assert item.metadata.labels == {"kubernetes.io/metadata.name": "x"}


def test_a_whole_policy() -> None:
    item = one(
        ingress(
            "from: [{ipBlock: {cidr: 10.0.0.9/8, except: [10.1.2.3/16]}}],"
            " ports: [{port: 80, endPort: 80}, {protocol: SCTP}, {port: http}]"
        )
    )
    assert isinstance(item, NetworkPolicy)
    (rule,) = item.spec.ingress
    assert rule.from_[0].ip_block is not None and rule.from_[0].ip_block.except_ == ["10.1.2.3/16"]
    assert [(p.protocol, p.port, p.end_port) for p in rule.ports] == [
        ("TCP", 80, 80),
        ("SCTP", None, None),
        ("TCP", "http", None),
    ]


def test_nulls_are_absent_fields() -> None:
    item = one(POLICY + "{podSelector: , policyTypes: , ingress: [{from: , ports: }], egress: }")
    assert item.spec.ingress[0].from_ == [] and item.spec.egress == []


def test_dates_and_base_60_numbers_are_text() -> None:
    item = one(pod(meta="name: x, annotations: {since: 2024-01-01, time: 12:30:45}"))
    assert item.metadata.annotations == {"since": "2024-01-01", "time": "12:30:45"}


def test_an_anchor_and_a_merge_key() -> None:
    text = (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  labels: &l {a: b, c: d}\n"
        "  annotations: {<<: *l, c: e}\nspec: {containers: [{name: c}]}\n"
    )
    assert one(text).metadata.annotations == {"a": "b", "c": "e"}


def test_documents_lists_and_json() -> None:
    item = yaml.safe_load(POD)
    other = item | {"metadata": {"name": "y", "namespace": "n"}}
    bare = {"metadata": {"name": "z"}, "spec": item["spec"]}
    pods = {"apiVersion": "v1", "kind": "PodList", "items": [bare]}
    listed = {"apiVersion": "v1", "kind": "List", "items": [item, other, pods]}
    parsed = parse(json.dumps(listed).encode(), "f.json")
    assert [o.metadata.name for o in parsed.objects] == ["x", "y", "z"]
    parsed = parse(f"---\n---\n{POD}---\n# nothing\n---\n{json.dumps(other)}\n", "f.yaml")
    assert parsed.places == ["f.yaml, document 2", "f.yaml, document 4"]
    parsed = parse(f"{json.dumps(item)}\n{json.dumps(other, indent=2)}", "f.json")
    assert parsed.places == ["f.json, document 1", "f.json, document 2"]
    assert parse("", "f.yaml") == parse(b"\xef\xbb\xbf# nothing\n", "f.yaml")


def test_other_kinds_are_ignored_with_a_warning_harmless_ones_silently() -> None:
    text = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {1: yes}\n---\n"
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: n}\n"
        "---\napiVersion: crd.projectcalico.org/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"
    )
    parsed = parse(text, "f.yaml")
    assert parsed.objects == []
    unknown = ", a kind that Lockgate does not know"
    assert parsed.warnings == [
        "f.yaml, document 2: ignored cilium.io/v2 CiliumNetworkPolicy n/p" + unknown,
        "f.yaml, document 3: ignored crd.projectcalico.org/v1 NetworkPolicy default/p" + unknown,
    ]


def test_duplicates_within_a_file() -> None:
    with pytest.raises(ManifestError) as error:
        parse(f"{POD}---\n{POD}", "f.yaml")
    assert str(error.value) == (
        "f.yaml, document 2 (Pod default/x), field metadata.name: expected a name that no other"
        " Pod has, got one that f.yaml, document 1 defines already"
    )


def test_duplicates_between_files() -> None:
    named = POD.replace("name: x", "name: x, namespace: default")
    with pytest.raises(ManifestError, match=r"^b.yaml, document 1 .* that a.yaml, document 1 def"):
        merge([parse(POD, "a.yaml"), parse(named, "b.yaml")])
    other = POD.replace("name: x", "name: x, namespace: other")
    assert len(merge([parse(POD, "a.yaml"), parse(other, "b.yaml")]).objects) == 2


# ---- Any input: objects or ManifestError, nothing else -----------------------


def survives(data: bytes | str) -> None:
    try:
        parse(data, "f.yaml")
    except ManifestError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    survives(data)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="{}[]:,-?&*!|>'\"%@# \n\tab1~<=."))
def test_any_text(text: str) -> None:
    survives(text)


WORDS = [
    *("apiVersion", "kind", "metadata", "spec", "status", "name"),
    *("namespace", "labels", "ingress", "egress", "from", "to"),
    *("ports", "port", "endPort", "protocol", "podSelector", "namespaceSelector"),
    *("matchLabels", "matchExpressions", "key", "operator", "values", "ipBlock"),
    *("cidr", "except", "policyTypes", "items", "containers", "selector"),
    *("template", "clusterIPs", "type", "endpoints", "addresses", "podIPs"),
    *("ip", "podCIDRs", "annotations", "env", "readinessProbe", "httpGet"),
    *("targetPort",),
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["v1", "Pod", "10.0.0.0/8", "::1", "TCP", "In", "Exists", "http", "None"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=6)
    ),
)
KINDS = st.sampled_from(
    [("v1", k) for k in ("Namespace", "Node", "Pod", "Service", "List", "PodList")]
    + [("apps/v1", k) for k in ("Deployment", "StatefulSet")]
    + [("batch/v1", "Job"), ("discovery.k8s.io/v1", "EndpointSlice")]
    + [("networking.k8s.io/v1", "NetworkPolicy")]
)


@settings(deadline=None)
@given(KINDS, st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=6), VALUES, st.booleans())
def test_any_object(kind: tuple[str, str], rest: dict[str, Any], spec: Any, named: bool) -> None:
    value = {"spec": spec, **rest, "apiVersion": kind[0], "kind": kind[1]}
    if named:
        value["metadata"] = {"name": "x"}
    survives(json.dumps(value))
    survives(yaml.safe_dump(value))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 8), st.sampled_from("{}[]:,-x \n"))))
def test_any_damaged_manifest(damage: list[tuple[int, int, str]]) -> None:
    text = POD + "---\n" + ingress("from: [{podSelector: {}}], ports: [{port: 80, endPort: 90}]")
    for at, length, insert in damage:
        text = text[:at] + insert + text[at + length :]
    survives(text)
