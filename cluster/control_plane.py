"""etcd, API server, controller manager and scheduler, in the network namespace `control`."""

from __future__ import annotations

from collections.abc import Mapping

from cluster import processes
from cluster.binaries import Binaries
from cluster.certificates import Authority
from cluster.commands import Word
from cluster.state import (
    API_SERVICE4,
    API_SERVICE6,
    CONTROL,
    CONTROL4,
    CONTROL6,
    OUTSIDE_CONTROL4,
    PODS4,
    PODS6,
    SERVICES4,
    SERVICES6,
    State,
)

__all__ = ["ControlPlane"]

SERVER = f"https://{CONTROL4}:6443"


class ControlPlane:
    """The programs by name; each can be stopped and started again. etcd's data is kept."""

    programs = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")

    def __init__(self, state: State, binaries: Binaries, authority: Authority) -> None:
        self.state = state
        self.binaries = binaries
        self.authority = authority

    def configure(self, host_address: str) -> None:
        """Write certificates, and kubeconfig files for the parts, for this machine's user, who
        reaches the API server at `host_address`, and for who is outside. Raises Failed."""
        authority, folder = self.authority, self.authority.folder
        authority.create()
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        addresses = (CONTROL4, CONTROL6, API_SERVICE4, API_SERVICE6, "127.0.0.1")
        authority.sign(
            "kube-apiserver",
            "kube-apiserver",
            "system:masters",  # towards kubelets
            [f"DNS:{name}" for name in (*names, "kubernetes.default.svc.cluster.local")]
            + [f"IP:{address}" for address in (*addresses, host_address, OUTSIDE_CONTROL4)],
        )
        for part in ("kube-controller-manager", "kube-scheduler"):
            files = authority.sign(part, f"system:{part}")
            authority.kubeconfig(folder / f"{part}.conf", SERVER, *files)
        files = authority.sign("admin", "admin", "system:masters")
        for path, address in (
            (self.state.kubeconfig, host_address),
            (self.state.outside_kubeconfig, OUTSIDE_CONTROL4),
        ):
            authority.kubeconfig(path, f"https://{address}:6443", *files)

    def start(self, program: str) -> None:
        """Start one of `programs`."""
        words = self._arguments()[program]
        command: list[Word] = [
            *("nsenter", f"--net={self.state.netns_path(CONTROL)}"),
            self.binaries.path(program),
            *(f"--{name}={value}" for name, value in words.items()),
        ]
        log = self.state.log_of(CONTROL, program)
        processes.launch(command, [self.state.program(CONTROL, program)], log)

    def _arguments(self) -> dict[str, Mapping[str, object]]:
        folder = self.authority.folder
        etcd = "http://127.0.0.1:2379"
        services = f"{SERVICES4},{SERVICES6}"
        certificate, key = folder / "kube-apiserver.crt", folder / "kube-apiserver.key"
        return {
            "etcd": {
                "data-dir": self.state.root / "etcd",
                "listen-client-urls": etcd,
                "advertise-client-urls": etcd,
                "listen-peer-urls": "http://127.0.0.1:2380",
                "unsafe-no-fsync": "true",
                "log-level": "warn",
            },
            "kube-apiserver": {
                "etcd-servers": etcd,
                "advertise-address": CONTROL4,
                "secure-port": 6443,
                "service-cluster-ip-range": services,
                "authorization-mode": "Node,RBAC",
                "enable-admission-plugins": "NodeRestriction",
                "allow-privileged": "true",
                "client-ca-file": self.authority.certificate,
                "tls-cert-file": certificate,
                "tls-private-key-file": key,
                "kubelet-certificate-authority": self.authority.certificate,
                "kubelet-client-certificate": certificate,
                "kubelet-client-key": key,
                "kubelet-preferred-address-types": "InternalIP",
                "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
                "service-account-key-file": self.authority.service_account_public,
                "service-account-signing-key-file": self.authority.service_account_key,
            },
            "kube-controller-manager": {
                "kubeconfig": folder / "kube-controller-manager.conf",
                "leader-elect": "false",
                "allocate-node-cidrs": "true",
                "cluster-cidr": f"{PODS4},{PODS6}",
                "node-cidr-mask-size-ipv4": 24,
                "node-cidr-mask-size-ipv6": 64,
                "service-cluster-ip-range": services,
                "use-service-account-credentials": "true",
                "service-account-private-key-file": self.authority.service_account_key,
                "root-ca-file": self.authority.certificate,
                "cluster-signing-cert-file": self.authority.certificate,
                "cluster-signing-key-file": self.authority.key,
            },
            "kube-scheduler": {
                "kubeconfig": folder / "kube-scheduler.conf",
                "leader-elect": "false",
            },
        }
