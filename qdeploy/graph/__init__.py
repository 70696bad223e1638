"""Reading, editing and running FX graphs: questions about nodes, layers with their parameters, channels that share a factor, blocks,
values of a graph on many samples, and taps for observers. Nothing here knows how a graph was captured or how it is quantized.

Imports: core, numerics.
"""
