"""What is read from the exported graph."""

from __future__ import annotations

from fewbit.graph.export import Watched, batch_size, export, leaves, signature
from fewbit.graph.integers import Graph, read_graph
from fewbit.graph.topology import Call, Topology, read_topology

__all__ = [
    "Call",
    "Graph",
    "Topology",
    "Watched",
    "batch_size",
    "export",
    "leaves",
    "read_graph",
    "read_topology",
    "signature",
]
