"""Several methods on one model at equal budgets, in one resumable run."""

from eigendamage.compare._compare import compare
from eigendamage.compare._competitor import ALL, Competitor

__all__ = ["ALL", "Competitor", "compare"]
