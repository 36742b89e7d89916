"""What the numbers of a report do not show by themselves, said as notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from eigendamage.batch import Batch, tensors_in
from eigendamage.calls import logits_of, tried_call
from eigendamage.layers import PACKING, evaluating, origin_of, preserved_random_state
from eigendamage.measure import Count
from eigendamage.plan import Budget

_COUNTED = 1e-3  # a plan counts what layers cost, not what a few operations beside them do
_FAR_BELOW = 0.8
_MEND = (
    "To keep it, compress a wrapper whose forward returns all that counts in one tensor, with "
    "loss='mse', say"
)


def other_outputs(original: nn.Module, result: nn.Module, batch: Batch) -> Iterator[str]:
    """Notes on outputs that the loss is not taken of, where it is taken of one tensor.

    Args:
        original: the model that was given.
        result: what became of it.
        batch: to run both on.
    """
    before, after = (dict(_others(_output(model, batch))) for model in (original, result))
    for name, was in before.items():
        now = after.get(name)
        if now is None or now.shape != was.shape:
            moved = "has another form now"
        else:
            moved = f"moved by {_moved(was, now)} (root mean square, one batch)"
        yield f"the loss is not taken of the model's output {name}, which {moved}. {_MEND}"


def sizes_against(budget: Budget, before: Count, after: Count) -> Iterator[str]:
    """Notes on a result that is larger than its plan said, or far smaller than the budget asks.

    Args:
        budget: of what was done.
        before: the size that its fractions are of.
        after: what was counted in the result.
    """
    counted = {"macs": (before.macs, after.macs), "params": (before.parameters, after.parameters)}
    for unit, fraction in budget.given.items():
        if unit not in counted:
            continue
        was, now = counted[unit]
        left = now / was
        if left > fraction * (1 + _COUNTED):
            yield (
                f"the model has {left:.4g} of the {unit}, above the budget of {fraction:g} that "
                f"its plan is within: most likely it reads the weight of a factored layer outside "
                f"that layer's forward, which multiplies the stages each time; leave that layer "
                f"alone with ignore="
            )
        elif left < _FAR_BELOW * fraction and len(budget.given) == 1:
            yield (
                f"the model has {left:.3g} of the {unit}, far below the budget of {fraction:g}: "
                f"no choice between was found, as units of equal price go together"
            )


def padding(result: nn.Module) -> Iterator[str]:
    """Notes on encoders that return other values at padding than they did."""
    for path, module in result.named_modules():
        known = origin_of(module)
        if known is not None and known.counts.get(PACKING) and not getattr(module, PACKING):
            yield (
                f"'{path}' no longer packs batches with padding, so that without gradients it "
                f"returns other values than 0 there: mask them where they are read. Both models "
                f"were measured unpacked"
            )


def _output(model: nn.Module, batch: Batch) -> Any:
    with torch.no_grad(), preserved_random_state(), evaluating(model):
        return tried_call(model, batch)


def _others(output: Any) -> Iterator[tuple[str, Tensor]]:
    """What a model returned beside the tensor that the loss is taken of, by name or number."""
    if isinstance(output, Mapping):
        items = [(repr(k), v) for k, v in cast("Mapping[Any, Any]", output).items()]
    elif isinstance(output, list | tuple):
        items = [(str(k), v) for k, v in enumerate(cast("list[Any] | tuple[Any, ...]", output))]
    elif not isinstance(output, Tensor) and hasattr(output, "__dict__"):
        items = [(repr(k), v) for k, v in vars(output).items()]
    else:
        return
    taken = logits_of(output)
    for name, item in items:
        found = [t for t in tensors_in(item) if t.is_floating_point() and t is not taken]
        for number, tensor in enumerate(found):
            yield (name if len(found) == 1 else f"{name}, tensor {number}"), tensor


def _moved(was: Tensor, now: Tensor) -> str:
    """The difference as a part of the deviation from the batch's mean, or as it is without one."""
    a, b = was.double(), now.double()
    difference = (b - a).square().mean().sqrt()
    spread = (a - a.mean(0)).square().mean().sqrt()
    if not bool(spread > 0):
        return f"{float(difference):.3g}"
    return f"{float(difference / spread):.1%} of its spread"
