"""Target hardware, one file each: its scheme as data, and the writer of its scale file.

Imports: core, formats.
"""

if __name__ != "qdeploy.backends":
    raise ImportError("import this folder as qdeploy.backends")
