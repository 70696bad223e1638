"""Real runtimes that can run an emitted file here: one file each, found by name in `runtime.runtimes`.

Imports: core.
"""
