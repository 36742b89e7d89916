"""Training what is left."""

from eigendamage.training._augment import Augment, crops_and_flips
from eigendamage.training._config import FinetuneConfig
from eigendamage.training._feed import length_of
from eigendamage.training._finetune import batch_digest, digest, finetune, worsening
from eigendamage.training._loop import Training
from eigendamage.training._polish import PolishConfig, polish

__all__ = [
    "Augment",
    "FinetuneConfig",
    "PolishConfig",
    "Training",
    "batch_digest",
    "crops_and_flips",
    "digest",
    "finetune",
    "length_of",
    "polish",
    "worsening",
]
