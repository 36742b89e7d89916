"""estimate_curvature: one pass over the data for S and A, one for λ, one for gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import nn

from eigendamage.batch import tensors_in
from eigendamage.batches import Batches, Data
from eigendamage.calls import device_of, require_gradients_possible
from eigendamage.curvature._capture import preserved_random_state
from eigendamage.curvature._curvature import Curvature, Extra
from eigendamage.curvature._head import Fisher
from eigendamage.curvature._layer import EigenvalueKind, LayerCurvature
from eigendamage.curvature._losses import Loss, head_of, loss_name
from eigendamage.curvature._memory import bytes_of, layer_bytes, within_memory
from eigendamage.curvature._passes import (
    Passes,
    calls_of,
    factors,
    with_eigenvalues,
    with_gradients,
)
from eigendamage.curvature._sinks import PatchWish
from eigendamage.curvature._survey import Survey, survey
from eigendamage.distributed import decided, mark_of, one_fate, require_same
from eigendamage.errors import EigenDamageError, MismatchError, NonFiniteError
from eigendamage.layers import Layer, find_channels, require_known, sketch_of
from eigendamage.seeds import check_seed


@one_fate
@torch.inference_mode(False)
def estimate_curvature(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    fisher: Fisher = "mc",
    eigenvalues: EigenvalueKind = "ekfac",
    basis: Curvature | None = None,
    ignore: Iterable[str] = (),
    max_examples: int | None = None,
    layers_per_pass: int | None = None,
    max_memory: int | str | None = None,
    factor_device: torch.device | str | None = None,
    also: Iterable[Extra] = (),
    patch_positions: int | None = 64,
    reduction: Literal["mean", "sum"] = "mean",
    seed: int = 0,
    progress: bool = True,
) -> Curvature:
    """Estimate the Fisher's Kronecker factors of every layer, and λ in their eigenbasis.

    Two passes over the data, each a forward and a backward pass that computes no weight gradients:
    one for S and A (Martens & Grosse 2015; Grosse & Martens 2016), one for λ (George et al. 2018).
    The model runs in eval mode and is left as it was: weights, gradients, hooks, modes, random
    state. Accumulators are float32 (float64 for float64 models), eigendecompositions float64.

    In a group of several processes (``torch.distributed``) all make this call with the same model
    and the same data. Batches are dealt out in turn, sums are reduced, eigendecompositions shared
    out; all get the same result to the bit, and that of a single process up to rounding.

    Args:
        model: the network. Its output, ``.logits`` of it, or the first item of a tuple is what the
            loss is taken of; the first axis is the batch.
        data: an iterable of batches: tensors, (input, label) pairs or dicts of keyword arguments
            (with ``labels``); a ``forward`` that takes one argument and knows none of the
            keywords gets the dict. It is gone through twice; an iterator is kept in memory for
            that.
        loss: ``cross_entropy`` (summed over positions), ``causal_lm`` (the same, where a token's
            output predicts the next token), ``mse`` or ``bce`` (averaged over an example's
            outputs), or a function of (output, target) for ``fisher="empirical"``. Tokens that an
            ``attention_mask`` (batch, tokens) of the data excludes count for nothing, nowhere.
        fisher: ``mc`` draws labels from the model's own prediction, ``exact`` takes the
            expectation over them (one backward pass a class and position), ``empirical`` uses the
            data's labels. The first two need no labels.
        eigenvalues: ``ekfac`` for λ, ``kfac`` for Λ_S Λ_A, which saves the second pass.
        basis: an earlier curvature of the model. S, A and the eigenbasis are taken from it and only
            λ is estimated here, so that several shards of data can share one basis and merge
            exactly.
        ignore: shell patterns over dotted paths of layers to leave alone.
        max_examples: stop after that many examples. A batch of several tensors is not cut.
        layers_per_pass: stream: handle only so many layers in one pass over the data, which bounds
            memory to their factors and kept inputs at the price of more passes. Finished factors
            move to ``factor_device``.
        max_memory: the same by bytes, or by a string such as ``"2GB"``: as many layers in one pass
            as their sums, bases and kept inputs stay below it, for batches of the size of the
            first. The model, its activations and finished factors come on top.
        factor_device: where factors and eigenvalues accumulate and stay; the layer's own by
            default, the CPU when streaming.
        also: what other methods than EigenDamage need. ``patches``: A over whole patches,
            (iK × iK), in the first pass. ``gradients``: the Fisher's exact diagonal and the
            first-order change of the loss by output, in a further pass. ``channels``: which
            channels can go together, traced by torch-pruning and proven on a few examples. See
            `needs` for what a method needs.
        patch_positions: the most positions of an example that ``patches`` reads, drawn uniformly;
            None for all. More examples are worth more than more positions of them.
        reduction: what a ``loss`` function that returns one number has done over the batch.
        seed: of the draws of labels and of positions. They are made in data order, so that neither
            batch size nor device changes them.
        progress: whether to show progress.

    Returns:
        A mapping from dotted path to `LayerCurvature`, in order of execution.

    Raises:
        NothingToCompressError: if the model has no compressible layer, or none that the loss
            depends on.
        DataError: if there is no example, if a batch has a form that is not known, or if no
            position counts: every label is ignored (-100) or every token masked.
        NonFiniteError: if inputs, weights, outputs or gradients hold a NaN or an infinity.
        LossError: if loss, output, labels and Fisher do not fit together.
        LayerError: if a layer's tensors cannot be told apart by example.
        MismatchError: if ``basis`` is of another model.
        ChannelError: if ``channels`` are wished for and cannot be traced.
        ProcessError: if another process of the group failed or ended.
    """
    _refuse_unknown(fisher, eigenvalues)
    check_seed(seed)
    _refuse_below_one(layers_per_pass=layers_per_pass, patch_positions=patch_positions)
    if layers_per_pass is not None and max_memory is not None:
        raise EigenDamageError("give layers_per_pass or max_memory, not both")
    limit = None if max_memory is None else bytes_of(max_memory)
    if (layers_per_pass is not None or limit is not None) and factor_device is None:
        factor_device = "cpu"
    if basis is not None and eigenvalues == "kfac":
        raise EigenDamageError(
            "basis= is there to estimate λ in it, and eigenvalues='kfac' takes Λ_S Λ_A, for which "
            "nothing would be estimated; leave out one of the two"
        )
    extras = _extras(also)
    home = None if factor_device is None else torch.device(factor_device)
    head = head_of(loss, reduction)

    require_gradients_possible(model)
    with preserved_random_state():
        batches = Batches(data, device_of(model), max_examples)
        first = batches.peek()
        surveyed = survey(model, first, ignore, head)
    _refuse_broken_weights(surveyed.layers.values())
    require_same("the weights", mark_of([*model.parameters(), *model.buffers()]))
    require_same("the first batches", mark_of(tensors_in([*first.args, *first.kwargs.values()])))
    options = (loss_name(loss), fisher, eigenvalues, layers_per_pass, limit, max_examples)
    options = (*options, extras, patch_positions, seed, basis is None)
    require_same("the options or the layers", (*options, *surveyed.layers))
    if basis is not None:
        _refuse_other_model(basis, surveyed.layers, extras)
    graph = decided(lambda: find_channels(model, first)) if "channels" in extras else None
    passes = Passes(model, batches, head, fisher, seed, progress)
    wish: PatchWish | None = None
    if "patches" in extras:
        wish = PatchWish.of(surveyed.layers, calls_of(surveyed.trace), patch_positions, seed)

    if limit is None:
        groups = _groups(list(surveyed.layers.values()), layers_per_pass)
    else:
        groups = _groups_within(limit, surveyed, first.size, patches=wish is not None)
    done: dict[str, LayerCurvature] = {}
    for index, group in enumerate(groups):
        part = "" if len(groups) == 1 else f" (layers {index + 1} of {len(groups)})"
        traced = surveyed.trace
        if basis is None:
            done.update(factors(group, passes, traced, home, wish, f"S and A{part}"))
        else:
            done.update({layer.name: basis[layer.name] for layer in group})
        if eigenvalues == "ekfac":
            done.update(with_eigenvalues(group, done, passes, traced, home, f"λ{part}"))
        if "gradients" in extras:
            done.update(with_gradients(group, done, passes, traced, home, f"gradients{part}"))
    return Curvature(
        layers={name: done[name] for name in surveyed.trace.layers if name in done},
        left_alone=surveyed.left_alone,
        classifier=surveyed.classifier,
        macs=surveyed.trace.macs,
        parameters=sum(p.numel() for p in model.parameters()),
        examples=passes.examples,
        loss=loss_name(loss),
        fisher=fisher,
        kind=eigenvalues,
        extras=extras,
        channels=graph,
        sketches={layer.name: sketch_of(layer.weight()) for layer in surveyed.layers.values()},
    )


def _extras(also: Iterable[Extra]) -> tuple[Extra, ...]:
    wanted = {also} if isinstance(also, str) else set(also)
    known: tuple[Extra, ...] = get_args(Extra)
    for unknown in sorted(wanted - set(known)):
        raise EigenDamageError(f"also='{unknown}' is unknown; known are {', '.join(known)}")
    return tuple(extra for extra in known if extra in wanted)


def _groups(layers: list[Layer], size: int | None) -> list[list[Layer]]:
    step = size or len(layers)
    return [layers[k : k + step] for k in range(0, len(layers), step)]


def _groups_within(
    limit: int, surveyed: Survey, examples: int, *, patches: bool
) -> list[list[Layer]]:
    def needed(layer: Layer) -> int:
        shape = surveyed.trace.layers[layer.name].shape
        return layer_bytes(layer, shape, examples, patches=patches)

    return within_memory(list(surveyed.layers.values()), needed, limit)


def _refuse_unknown(fisher: str, eigenvalues: str) -> None:
    if fisher not in ("mc", "exact", "empirical"):
        raise EigenDamageError(f"fisher '{fisher}' is unknown; known are mc, exact, empirical")
    if eigenvalues not in ("ekfac", "kfac"):
        raise EigenDamageError(f"eigenvalues '{eigenvalues}' is unknown; known are ekfac, kfac")


def _refuse_below_one(*, layers_per_pass: int | None, patch_positions: int | None) -> None:
    for what, count in (("layers_per_pass", layers_per_pass), ("patch_positions", patch_positions)):
        if count is not None and count < 1:
            raise EigenDamageError(f"{what} is {count}; it must be at least 1")


def _refuse_broken_weights(layers: Iterable[Layer]) -> None:
    for layer in layers:
        weight = layer.weight()
        if not bool(torch.isfinite(weight).all()):
            bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteError(
                f"layer '{layer.name}': {bad} of {weight.numel()} weights are NaN or infinite; "
                f"the model cannot be compressed as it is"
            )


def _refuse_other_model(
    basis: Curvature, layers: Mapping[str, Layer], extras: tuple[Extra, ...]
) -> None:
    if "patches" in extras and "patches" not in basis.extras:
        raise MismatchError(
            "patches are taken from the basis, as S and A are, but the basis given was estimated "
            "without also=('patches',)"
        )
    for name, layer in layers.items():
        if name not in basis:
            raise MismatchError(f"layer '{name}' of the model is not in the curvature given")
        expected = (layer.outputs, layer.inputs, layer.offsets)
        if tuple(basis[name].eigenvalues.shape) != expected:
            raise MismatchError(
                f"layer '{name}' has a weight of shape {expected} (o, i, K), but the curvature "
                f"given is for {tuple(basis[name].eigenvalues.shape)}"
            )
        require_known(layer, basis.sketches.get(name), "curvature")
