"""The version of qdeploy: in one place, for the package, the manifests and the ONNX files."""

__version__ = "0.1.0"
