"""Models and data named on the command line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from eigendamage import zoo
from eigendamage.batch import as_batch
from eigendamage.batches import Data
from eigendamage.distributed import rank
from eigendamage.errors import DataError, EigenDamageError
from eigendamage.integrations.huggingface import UnusedWeights
from eigendamage.integrations.names import get_model, has_random_weights, raised, result_of

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


def load_model(
    name: str, weights: Path | None, *, pretrained: bool = False, quiet: bool = False
) -> nn.Module:
    """The model of that name, see `get_model`.

    A line on standard error tells if its weights are random, or if its file has some that it does
    not take; ``quiet`` leaves it out, where the weights do not matter.

    Raises:
        EigenDamageError: as `get_model` does.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UnusedWeights)
        model = get_model(name, weights=weights, pretrained=pretrained)
    for warning in told:
        if not issubclass(warning.category, UnusedWeights):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif rank() == 0 and not quiet:
            print(f"note: {warning.message}", file=sys.stderr)
    if (
        has_random_weights(name, weights=weights, pretrained=pretrained)
        and rank() == 0
        and not quiet
    ):
        also = "" if name.startswith("zoo:") else " or --pretrained"
        print(
            f"note: the weights of {name} are random: nothing that is measured of it means "
            f"anything; give --weights FILE{also}",
            file=sys.stderr,
        )
    return model


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
        MissingFileError: if there is no such folder or file.
        DataError: if there is nothing to read in it.
        EigenDamageError: if there is no such callable, or it raises.
    """
    if source != _BUNDLED and not Path(source).exists() and ":" in source:
        made = result_of(source)
        data, eval_data, where = made, None, ""
        if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
            data, eval_data = cast("tuple[Any, Any]", made)
            where = "the second part that the callable returned"
        most = max(examples or 0, 0 if training is None else training.examples or 0)
        data, eval_data = _first(source, data, most), _first(source, eval_data, test_examples or 0)
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


def _first(source: str, data: Any, most: int) -> Any:
    """Of an iterator, which may have no end, the batches of the first examples; 0 for all."""
    if not isinstance(data, Iterator):
        return data
    found: list[Any] = []
    seen = 0
    try:
        for index, raw in enumerate(cast("Iterator[Any]", data)):
            found.append(raw)
            seen += as_batch(raw, index, torch.device("cpu")).size
            if seen >= most > 0:
                break
    except EigenDamageError:
        raise
    except Exception as error:
        raise DataError(f"{source} was gone through and raised {raised(error)}") from error
    return found


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
