"""From a model and data to a smaller model and a report, in one call; or to many of them."""

from eigendamage.compress._compress import check_steps, compress
from eigendamage.compress._preview import preview
from eigendamage.compress._result import Compressed
from eigendamage.compress._sweep import BUDGETS, sweep

__all__ = ["BUDGETS", "Compressed", "check_steps", "compress", "preview", "sweep"]
