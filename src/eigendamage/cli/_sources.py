"""Models and data named on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from eigendamage import zoo
from eigendamage.batches import Data
from eigendamage.errors import DataError, EigenDamageError

_HELD_OUT = 0.1
_BUNDLED = "zoo:fashion-mnist"


@dataclass(frozen=True)
class Images:
    """What the command works with.

    Attributes:
        data: batches for the curvature, in training order.
        eval_data: held-out batches to measure on, None if there are none.
        where: what ``eval_data`` is, in words.
        train_data: batches to fine-tune on, None if that is not asked for.
    """

    data: Data
    eval_data: Data | None
    where: str
    train_data: Iterable[Any] | None = None


@dataclass(frozen=True)
class Training:
    """What is fine-tuned on.

    Attributes:
        examples: the most images; None for all.
        augment: whether they are shifted and mirrored.
    """

    examples: int | None
    augment: bool


def load_model(name: str, weights: Path | None) -> nn.Module:
    """Build the model ``zoo:NAME`` or ``module:callable`` and load its weights, in eval mode.

    Raises:
        EigenDamageError: if the name is of neither form, or the callable gives no module.
    """
    kind, _, rest = name.partition(":")
    built = zoo.get(rest)() if kind == "zoo" else _from_module(name, "--model")()
    if not isinstance(built, nn.Module):
        raise EigenDamageError(
            f"--model {name} returned {type(built).__name__}; it must return a torch.nn.Module"
        )
    if weights is not None:
        zoo.load_weights(built, weights)
    return built.eval()


def load_data(
    source: str,
    *,
    examples: int,
    batch_size: int,
    seed: int,
    test_examples: int | None,
    training: Training | None = None,
) -> Images:
    """Read ``DIR``, ``ZIP``, ``NPZ``, the bundled images, or call ``module:callable``.

    Where images have no ``test`` split, a tenth of them is held out to measure on. A callable
    returns an iterable of batches, or a pair of two: one to work with, one to measure on; the
    former is trained on too.

    Raises:
        DataError: if there is nothing to read.
    """
    if source != _BUNDLED and not Path(source).exists() and ":" in source:
        made = _from_module(source, "--data")()
        data, eval_data, where = made, None, ""
        if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
            data, eval_data = cast("tuple[Any, Any]", made)
            where = "the second part that the callable returned"
        return Images(data, eval_data, where, None if training is None else data)
    most = examples if training is None else training.examples
    if source == _BUNDLED:
        train, test = zoo.fashion_mnist("train"), zoo.fashion_mnist("test")
        train = train if most is None else train.take(slice(0, most))
        test = test if test_examples is None else test.take(slice(0, test_examples))
        where = "the bundled test images"
    else:
        train, test, where = _read(source, most, test_examples, seed)
    return Images(
        train.take(slice(0, examples)).batches(batch_size),
        test.batches(batch_size),
        where,
        None
        if training is None
        else train.batches(batch_size, shuffle_seed=seed, augment=training.augment),
    )


def _read(
    source: str, most: int | None, test_examples: int | None, seed: int
) -> tuple[zoo.ImageSet, zoo.ImageSet, str]:
    """Images to work with, images to measure on, and what these are."""
    if "test" in zoo.find_splits(source):
        train = zoo.load_images(source, "train", limit=most, seed=seed)
        test = zoo.load_images(source, "test", limit=test_examples, seed=seed)
        return train, test, f"the test split of {source}"
    every = zoo.load_images(source, "train", limit=most, seed=seed)
    held = max(1, round(_HELD_OUT * len(every)))
    if len(every) - held < 1:
        raise DataError(f"{source} has {len(every)} image; at least two are needed")
    where = f"a tenth of {source}, held out"
    return every.take(slice(held, None)), every.take(slice(0, held)), where


def _from_module(name: str, option: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise EigenDamageError(f"{option} {name}: expected zoo:NAME, module:callable, or a path")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise EigenDamageError(
            f"{option} {name}: there is no module '{error.name}' here; run the command in its "
            f"folder or install it"
        ) from error
    except AttributeError as error:
        raise EigenDamageError(
            f"{option} {name}: module '{module_name}' has no '{attribute}'"
        ) from error
    if not callable(found):
        raise EigenDamageError(f"{option} {name} is {type(found).__name__}, not callable")
    return cast("Callable[[], Any]", found)
