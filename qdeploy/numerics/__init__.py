"""The formulas of quantization, statistics of streams of tensors (observers), learned rounding, and `Quantizer`, the one module that
a simulation adds to a graph. Nothing here knows a graph or a target.

Imports: core.
"""
