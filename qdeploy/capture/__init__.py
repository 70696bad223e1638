"""From a user's model to a clean float graph: its inputs and open dimensions, `torch.export`, decompositions, simplifications, names,
and batch norms folded into layers. A pass changes how the graph is written, never what it computes.

Imports: core, graph, numerics.
"""
