"""Doing what a plan says, and nothing else."""

from eigendamage.surgery._apply import apply_plan
from eigendamage.surgery._batchnorm import recalibrate_batchnorm

__all__ = ["apply_plan", "recalibrate_batchnorm"]
