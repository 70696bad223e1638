"""From a clean graph to a simulation of one target: the plan (which tensor is quantized how, and why), quantizers put into the graph,
and numbers that make all runtimes round alike.

Imports: capture, core, graph, numerics.
"""
