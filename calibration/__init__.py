"""Ways to choose numbers, one file each: range observers now, equalization and rounding as they come."""

if __name__ != "qdeploy.calibration":
    raise ImportError("import this folder as qdeploy.calibration")
