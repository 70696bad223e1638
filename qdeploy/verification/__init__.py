"""The proof of an artifact: what was written is run on real runtimes and compared with what was simulated.

Imports: capture, core, export, graph, numerics, runtimes, simulation.
"""
