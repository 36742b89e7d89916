"""Training what is left."""

from eigendamage.training._augment import Augment, crops_and_flips
from eigendamage.training._config import FinetuneConfig
from eigendamage.training._finetune import digest, finetune
from eigendamage.training._loop import Training
from eigendamage.training._polish import PolishConfig, polish

__all__ = [
    "Augment",
    "FinetuneConfig",
    "PolishConfig",
    "Training",
    "crops_and_flips",
    "digest",
    "finetune",
    "polish",
]
