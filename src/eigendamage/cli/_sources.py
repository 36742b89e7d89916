"""Models and data named on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from eigendamage import zoo
from eigendamage.batches import Data
from eigendamage.errors import DataError, EigenDamageError

_HELD_OUT = 0.1


@dataclass(frozen=True)
class Images:
    """What the command works with.

    Attributes:
        data: batches for the curvature, in training order.
        eval_data: held-out batches to measure on, None if there are none.
        where: what ``eval_data`` is, in words.
    """

    data: Data
    eval_data: Data | None
    where: str


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
    source: str, *, examples: int, batch_size: int, seed: int, test_examples: int | None
) -> Images:
    """Read ``DIR``, ``ZIP``, ``NPZ`` or call ``module:callable``.

    Where images have no ``test`` split, a tenth of them is held out to measure on. A callable
    returns an iterable of batches, or a pair of two: one to work with, one to measure on.

    Raises:
        DataError: if there is nothing to read.
    """
    if not Path(source).exists() and ":" in source:
        made = _from_module(source, "--data")()
        if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
            data, eval_data = cast("tuple[Any, Any]", made)
            return Images(data, eval_data, "the second part that the callable returned")
        return Images(made, None, "")
    splits = zoo.find_splits(source)
    if "test" in splits:
        train = zoo.load_images(source, "train", limit=examples, seed=seed)
        test = zoo.load_images(source, "test", limit=test_examples, seed=seed)
        where = f"the test split of {source}"
    else:
        every = zoo.load_images(source, "train", limit=examples, seed=seed)
        held = max(1, round(_HELD_OUT * len(every)))
        if len(every) - held < 1:
            raise DataError(f"{source} has {len(every)} image; at least two are needed")
        train, test = every.take(slice(held, None)), every.take(slice(0, held))
        where = f"a tenth of {source}, held out"
    return Images(train.batches(batch_size), test.batches(batch_size), where)


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
