"""What is read from the exported graph."""

from __future__ import annotations

from fewbit.graph.topology import Call, Topology, read_topology

__all__ = ["Call", "Topology", "read_topology"]
