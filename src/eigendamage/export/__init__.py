"""A model as a file that runs without this package: ONNX, torch.export, or torch.nn in Python."""

from eigendamage.export._export import Export, Format, export
from eigendamage.export._plain import plain

__all__ = ["Export", "Format", "export", "plain"]
