"""How numbers are found: the one pass over the data, the steps of recipes and what judges them, reconstruction of blocks, and images
distilled for models without data. Observers and steps themselves are files of `calibration/`, found by name.

Imports: capture, core, graph, numerics, simulation.
"""
