"""What can be measured of a model: its cost, its loss, its distance from another."""

from eigendamage.measure._count import Count, count
from eigendamage.measure._evaluate import Evaluation, evaluate

__all__ = ["Count", "Evaluation", "count", "evaluate"]
