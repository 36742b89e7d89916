"""Calls of `compress` on odd networks with odd options, and what has to hold of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import eigendamage as ed
from eigendamage.plan import METHODS, WeightMethod
from tests.hard.odd_networks import Choose, OddNetwork, odd_network

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What takes long is rare, so that many calls fit into a minute.
_OPTIONS: tuple[dict[str, Any], ...] = (
    *({},) * 8,
    {"polish": 1},
    {"rounds": 2},
    {"rounds": 2, "epochs": 1},
    {"shots": 2},
    {"eigenvalues": "kfac"},
    {"fisher": "exact"},
    {"fisher": "empirical"},
    {"ignore": ("0*",)},
    {"damping": 1e30},
    {"damping": 1e-30},
    {"max_ratio": 0.5},
    {"multiple": 4},
    {"floors": {"*": 0.5}},
    {"actions": ("channels",)},
    {"actions": ("low-rank",)},
    {"actions": ("blocks",)},
    {"refine": 0},
    {"repair": False},
    {"repair": True},
    {"calibrate": False},
    {"recalibrate": True},
    {"calibration_examples": 3},
    {"max_examples": 1},
    {"max_examples": 7},
    {"max_memory": "1KB"},
)


@dataclass(frozen=True)
class OddCall:
    """One call of `compress`; it prints as what repeats it."""

    network: OddNetwork
    method: str
    variant: str | None
    budget: dict[str, float]
    sizes: tuple[int, ...]
    data: Literal["list", "generator", "loader"]
    labels: bool
    loss: Literal["cross_entropy", "mse", "bce"]
    dtype: torch.dtype
    channels_last: bool
    train_mode: bool
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The network in its dtype, format and mode."""
        model = self.network.model().to(self.dtype)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.train(self.train_mode)

    def batches(self) -> list[Any]:
        """The data, as a list of batches."""
        x = self.network.inputs(sum(self.sizes)).to(self.dtype)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        parts = x.split(list(self.sizes))
        if not self.labels:
            return list(parts)
        return [(part, self._targets(len(part))) for part in parts]

    def given(self) -> Any:
        """The data in the form that is asked for."""
        batches = self.batches()
        if self.data == "list":
            return batches
        if self.data == "generator":
            return (batch for batch in batches)
        # Without a generator of its own a loader draws from torch's at every pass.
        return DataLoader(batches, batch_size=None, generator=torch.Generator())

    def _targets(self, count: int) -> Tensor:
        if self.loss == "cross_entropy":
            return torch.arange(count) % self.network.classes
        return (torch.arange(count * self.network.classes) % 2).view(count, -1).to(self.dtype)


def odd_call(choose: Choose) -> OddCall:
    """A call by a way of choosing."""
    network = odd_network(choose)
    method = choose(("auto", "auto", "auto", *METHODS))
    variants = [None, *getattr(METHODS[method], "variants", {})]
    left = choose((0.95, 0.8, 0.6, 0.4, 0.2))
    kinds: list[dict[str, float]] = [{"macs": left}, {"params": left}, {"bytes": left}]
    if method == "auto":
        kinds += [{"macs": left, "params": min(1.0, left + 0.1)}, {"loss": 0.05}]
    else:
        kinds.append({"ratio": 1 - left})
    budget = choose(kinds)
    if isinstance(METHODS[method], WeightMethod):
        budget = {"ratio": 1 - left}
    labels = choose((True, False))
    options: dict[str, Any] = {"seed": choose((0, 1))}
    for more in (choose(_OPTIONS), choose(_OPTIONS)):
        options |= more
    stepped = {"rounds", "shots"} & options.keys()
    if method != "auto":
        for name in ("shots", "floors", "multiple", "actions", "refine", "calibrate"):
            options.pop(name, None)
    if "loss" in budget:
        for name in (*stepped, "epochs"):
            options.pop(name, None)
    if "fisher" in options and not labels:
        options["fisher"] = "exact"
    return OddCall(
        network=network,
        method=method,
        variant=choose(variants),
        budget=budget,
        sizes=choose(((8, 8), (1,), (2,), (1, 1, 1), (5, 3, 1), (16,), (4, 4, 4, 4))),
        data=choose(("list", "generator", "loader")),
        labels=labels,
        loss=choose(("cross_entropy", "cross_entropy", "mse", "bce")),
        dtype=choose(DTYPES),
        channels_last=choose((True, False)),
        train_mode=choose((False, False, True)),
        options=options,
    )


def outcome(call: OddCall, folder: Path) -> str:
    """Make a call and check all that has to hold; ``met``, or the class of the error it ended in.

    Raises:
        AssertionError: naming what does not hold.
        Exception: any that is no `EigenDamageError`, which a call may not end in.
    """
    model = call.model()
    before, kept = fingerprint(model), _random_states()
    options = {"loss": call.loss, **call.options}
    try:
        result = ed.compress(
            model,
            call.given(),
            budget=ed.Budget(**call.budget),
            method=call.method,
            variant=call.variant,
            progress=False,
            **options,
        )
    except ed.EigenDamageError as error:
        assert len(str(error)) > 20, repr(error)
        return type(error).__name__
    finally:
        assert fingerprint(model) == before, "the model that was given was changed"
        assert _same(_random_states(), kept), "a random state was changed"
    x = call.network.inputs(2).to(call.dtype)
    _check_budget(call, model, result, x)
    _check_runs(result.model, model, x)
    _check_saved(call, result, x, folder)
    return "met"


def fingerprint(model: nn.Module) -> list[object]:
    """All of a model that a call may not change."""
    found: list[object] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.append((name, id(tensor), tensor.requires_grad, tensor.grad is None, tensor.stride()))
        found.append(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in _HOOKS]
        found.append((name, id(module), module.training, hooks, sorted(vars(module))))
    return found


def _random_states() -> tuple[Any, ...]:
    # Not Python's: the checks of annotations, with which tests run, draw from it.
    return torch.get_rng_state(), np.random.get_state()[1].tolist()


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def _check_budget(call: OddCall, model: nn.Module, result: ed.Compressed, x: Tensor) -> None:
    start, left = ed.count(model, x), ed.count(result.model, x)
    for unit, limit in call.budget.items():
        if unit == "macs":
            assert left.macs <= limit * start.macs * (1 + 1e-9), (left.macs, start.macs, limit)
        elif unit in ("params", "bytes"):
            assert left.parameters <= limit * start.parameters, (left, start, limit)
        elif unit == "loss":
            found = result.report.final.divergence
            assert found is not None
            assert found <= limit * (1 + 1e-6), (found, limit)
    assert left.parameters == result.report.parameters[1]


def _check_runs(small: nn.Module, model: nn.Module, x: Tensor) -> None:
    modes = [m.training for m in small.modules()]
    small.eval()
    shape = _in_eval(model, x).shape
    output = small(x)
    assert output.shape == shape
    assert output.dtype == x.dtype
    assert bool(torch.isfinite(output).all()), "an output is not finite"
    output.float().square().sum().backward()
    for name, parameter in small.named_parameters():
        gradient = parameter.grad
        assert gradient is None or bool(torch.isfinite(gradient).all()), name
        parameter.grad = None
    for module, mode in zip(small.modules(), modes, strict=True):
        module.training = mode


def _check_saved(call: OddCall, result: ed.Compressed, x: Tensor, folder: Path) -> None:
    ed.save(result, folder)
    loaded = ed.load(call.model(), folder)
    saved = result.model.state_dict()
    assert list(saved) == list(loaded.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    assert torch.equal(_in_eval(loaded, x), _in_eval(result.model, x))


def _in_eval(model: nn.Module, x: Tensor) -> Tensor:
    modes: Iterator[bool] = iter([m.training for m in model.modules()])
    model.eval()
    with torch.no_grad():
        output = model(x)
    for module in model.modules():
        module.training = next(modes)
    return output
