"""From a simulation to files: one export to ONNX, the views of it that targets get, and the artifact, the folder that is written at
once or not at all.

Imports: capture, core, graph, numerics, simulation.
"""
