"""Kubernetes' own end-to-end tests of networking (test/e2e, [sig-network]) against Lockgate.

    python -m cluster conformance                    # make conformance: a cluster of its own
    python -m cluster conformance --focus Netpol     # those whose name matches
    python -m cluster up --install --name x          # or on one that is up, which stays
    python -m cluster conformance --name x --focus 'DNS should'

Every spec of [sig-network] runs, but for those that left_out.yaml names with a reason. A spec that
skips itself without being named there counts as failed: nothing is passed that was not run.
Results: build/conformance/{junit.xml,batch-N.log}.
"""

from __future__ import annotations

from cluster.conformance.command import RESULTS, run

__all__ = ["RESULTS", "run"]
