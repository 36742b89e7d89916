"""What a shell offers for the values of options."""

from __future__ import annotations

from eigendamage.integrations.names import FORMS
from eigendamage.plan import METHODS
from eigendamage.zoo import MODELS

MODEL_HELP = f"The model: {FORMS}."

_PREFIXES = ("timm:", "torchvision:", "hf:")


def model_names(incomplete: str) -> list[str]:
    """Networks of the zoo, and what other names begin with."""
    names = [*(f"zoo:{name}" for name in MODELS), *_PREFIXES]
    return [name for name in names if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """Methods by their names."""
    return [name for name in METHODS if name.startswith(incomplete)]
