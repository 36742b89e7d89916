"""Models on disk, and factored layers multiplied out again."""

from eigendamage.saving._densify import densify
from eigendamage.saving._describe import describe
from eigendamage.saving._save import load, restore, save
from eigendamage.saving._structure import ModuleForm, Stages, Structure

__all__ = [
    "ModuleForm",
    "Stages",
    "Structure",
    "densify",
    "describe",
    "load",
    "restore",
    "save",
]
