"""Models by name: of the zoo, of timm, torchvision and transformers, or of a module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any, cast

from torch import nn

from eigendamage import zoo
from eigendamage.errors import EigenDamageError
from eigendamage.integrations.huggingface import pretrained_model
from eigendamage.integrations.timm import timm_model
from eigendamage.integrations.torchvision import torchvision_model

FORMS = "zoo:NAME, timm:NAME, torchvision:NAME, hf:PATH or module:callable"
"""What a model's name may look like."""

_TRAINED_IN_THE_ZOO = ("demo_network",)


def get_model(
    name: str, *, weights: str | Path | None = None, pretrained: bool = False
) -> nn.Module:
    """A model by its name, in eval mode.

    - ``zoo:NAME``: a network of this package, see `zoo.get`.
    - ``timm:NAME``: of timm, as ``timm.create_model`` has it (extra ``timm``).
    - ``torchvision:NAME``: as ``torchvision.models.get_model`` has it (extra ``torchvision``).
    - ``hf:PATH``: a folder that transformers' ``save_pretrained`` wrote, or an id of the hub
      (extra ``huggingface``).
    - ``module:callable``: what the callable returns. The current folder is searched first.

    Args:
        name: as above.
        weights: a file with a state dict for it, ``.safetensors``, ``.pt`` or ``.pth``; nothing in
            it is run. Without it, and without ``pretrained``, models of timm and torchvision, and
            those of the zoo but its demo network, have random weights.
        pretrained: fetch the weights that timm or torchvision have for it.

    Raises:
        ExtraError: if the package that has it is not installed; the message names the extra.
        EigenDamageError: if there is no such model, if the callable raises (its error is the
            cause), or if ``pretrained`` is not for this kind of name.
        MissingFileError: if there is no such file of weights.
        FileFormatError: if it holds no state dict.
        MismatchError: if the weights do not fit the model.

    Warns:
        UnusedWeights: if the file of an ``hf:`` model has weights that it does not take.
    """
    kind, _, rest = name.partition(":")
    if pretrained and kind not in ("timm", "torchvision"):
        raise EigenDamageError(
            f"pretrained is for timm:NAME and torchvision:NAME, not for '{name}'; give the weights "
            f"as a file"
        )
    if pretrained and weights is not None:
        raise EigenDamageError("give pretrained or a file of weights, not both")
    match kind:
        case "zoo":
            model = zoo.get(rest)()
        case "timm":
            model = timm_model(rest, pretrained=pretrained)
        case "torchvision":
            model = torchvision_model(rest, pretrained=pretrained)
        case "hf":
            model = pretrained_model(rest)
        case _:
            model = _made(name)
    if weights is not None:
        zoo.load_weights(model, weights)
    return model.eval()


def has_random_weights(
    name: str, *, weights: str | Path | None = None, pretrained: bool = False
) -> bool:
    """Whether `get_model` returns an untrained model for the same arguments.

    What ``module:callable`` returns is taken to be as it should be.
    """
    kind, _, rest = name.partition(":")
    if weights is not None or pretrained:
        return False
    return kind in ("timm", "torchvision") or (kind == "zoo" and rest not in _TRAINED_IN_THE_ZOO)


def callable_named(name: str) -> Callable[[], Any]:
    """The callable ``module:callable``; the current folder is searched first.

    Raises:
        EigenDamageError: if there is none of that name, or its module fails on import.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise EigenDamageError(f"'{name}' is no module:callable")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise EigenDamageError(
            f"{name}: there is no module '{error.name}' here; run the command in its folder or "
            f"install it"
        ) from error
    except (Exception, SystemExit) as error:
        raise EigenDamageError(
            f"{name}: importing '{module_name}' raised {raised(error)}"
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        raise EigenDamageError(f"{name}: module '{module_name}' has no '{attribute}'") from error
    if not callable(found):
        raise EigenDamageError(f"{name} is {type(found).__name__}, not callable")
    return cast("Callable[[], Any]", found)


def result_of(name: str) -> Any:
    """What the callable ``module:callable`` returns.

    Raises:
        EigenDamageError: as `callable_named` does, and if the callable raises, with its message.
    """
    function = callable_named(name)
    try:
        return function()
    except EigenDamageError:
        raise
    except (Exception, SystemExit) as error:
        raise EigenDamageError(f"{name} was called and raised {raised(error)}") from error


def raised(error: Exception | SystemExit) -> str:
    """An error of somebody else's code in one line, with the line of it that led there."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    # Not where a library noticed it: that is seldom where it can be mended.
    theirs = [p for p in extract_tb(error.__traceback__) if _is_theirs(p.filename)]
    return (
        f"{said} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else said
    )


def _is_theirs(file: str) -> bool:
    library = {"site-packages", "importlib"} & {*Path(file).parts}
    return not library and not file.startswith("<") and file != __file__


def _made(name: str) -> nn.Module:
    if ":" not in name:
        raise EigenDamageError(f"the model '{name}' is of no known form; expected {FORMS}")
    built = result_of(name)
    if not isinstance(built, nn.Module):
        raise EigenDamageError(
            f"{name} returned {type(built).__name__}; it must return a torch.nn.Module"
        )
    return built
