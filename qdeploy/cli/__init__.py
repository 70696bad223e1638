"""The command line: it parses, prints and calls `qdeploy.api`, nothing else.

Imports: api, capture, core, export, files, numerics, recipes, runtimes, simulation, verification.
"""
