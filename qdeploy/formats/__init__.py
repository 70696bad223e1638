"""Scale files that more than one target reads, a family of formats each. What only one target reads is written in its backend.

Imports: core.
"""
