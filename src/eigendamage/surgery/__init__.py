"""Doing what a plan says, and nothing else."""

from eigendamage.surgery._apply import apply_own_plan, apply_plan
from eigendamage.surgery._batchnorm import recalibrate_batchnorm
from eigendamage.surgery._made import Made, made_by, set_made
from eigendamage.surgery._repair import LayerRepair, Repairs, repair_model

__all__ = [
    "LayerRepair",
    "Made",
    "Repairs",
    "apply_own_plan",
    "apply_plan",
    "made_by",
    "recalibrate_batchnorm",
    "repair_model",
    "set_made",
]
