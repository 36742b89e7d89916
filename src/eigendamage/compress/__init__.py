"""From a model and data to a smaller model and a report, in one call."""

from eigendamage.compress._compress import Compressed, compress

__all__ = ["Compressed", "compress"]
