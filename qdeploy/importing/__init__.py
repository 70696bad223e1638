"""ONNX files as models: `program.load` gives the exported program, or the module, that the file's graph is.

Imports: capture, core.
"""
