"""Training what is left."""

from eigendamage.training._finetune import FinetuneConfig, finetune

__all__ = ["FinetuneConfig", "finetune"]
