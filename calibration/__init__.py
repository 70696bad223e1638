"""Ways to choose numbers, one file each: an observer that finds ranges, or a step that changes weights, biases and scales.

Imports: core, graph, numerics, recipes, simulation.
"""

if __name__ != "qdeploy.calibration":
    raise ImportError("import this folder as qdeploy.calibration")
