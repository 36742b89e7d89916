"""The version, in one place for code; pyproject has the same number."""

from importlib.metadata import version

__version__ = version("eigendamage")
