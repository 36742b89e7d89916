"""What every test shares."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec

import jaxtyping
import pytest
import torch

from tests.cases import CASES, Case

# Package indices give torchvision's wheel for CUDA. Beside a CPU build of torch its compiled part
# does not load, and its import, and with it that of transformers and lightning, ends at operators
# that only that part defines. No model of the tests calls them: that they exist is enough.
if find_spec("torchvision") is not None and torch.version.cuda is None:
    _operators = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_decorated = jaxtyping.jaxtyped
_seen: set[tuple[str, int]] = set()
_SHAPE = re.compile(r"\w+\[(Tensor|np\.ndarray)\b.*, *['\"]")  # as in Float[Tensor, "n c"]


def _decorated_for_shapes(*, typechecker: object) -> Callable[[object], object]:
    """The import hook's decorator, for what has shapes among its annotations.

    The rest has types that pyright has checked already, and checking them again at every call takes
    nearly half of the time of all tests. Functions within functions are left bare from their second
    time: they are defined, and so decorated, at every call of the outer one, which takes
    milliseconds of compiling.
    """

    def decorate(function: object) -> object:
        hints = getattr(function, "__annotations__", {}).values()
        if not any(_SHAPE.search(str(hint)) for hint in hints):
            return function
        code = getattr(function, "__code__", None)
        if code is not None and "<locals>" in code.co_qualname:
            place = code.co_filename, code.co_firstlineno
            if place in _seen:
                return function
            _seen.add(place)
        return _decorated(function, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = _decorated_for_shapes  # before anything imports the package


@pytest.fixture(params=list(CASES), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each model of the table in turn."""
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
