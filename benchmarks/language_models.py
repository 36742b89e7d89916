"""Language models made smaller: ours beside the SVDs of the literature and removal by magnitude.

Sizes are fractions of the parameters of the compressible Linear layers; embeddings and what shares
their weight stay. Everything is decided on calibration text, without labels; the held-out text is
only measured on. Then all are distilled alike: KL from the original on the calibration text, a few
steps. Run, with a folder of `LlamaForCausalLM` and texts of one story after another,

    python benchmarks/language_models.py stories --model FOLDER --text TRAIN.txt --held-out TEST.txt

or, with the folder and the text of `scripts/train_char_gpt.py`,

    python benchmarks/language_models.py characters --model FOLDER --text TEXT.txt

Rows of other models and sizes in the results file stay.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from recording import add_row
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.integrations.huggingface import TokenBatch, plain_linears, text_batches
from eigendamage.layers import copy_model

SIZES = (0.9, 0.8, 0.7, 0.6, 0.5)
COMMAND = "python benchmarks/language_models.py stories|characters --model FOLDER --text TEXT …"
DISTILLED = ed.FinetuneConfig(
    epochs=1,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.0,
    clip=1.0,
    temperature=1.0,
    label_share=0.0,
    held_out=0.0,
)
LENGTH = 256


@dataclass(frozen=True)
class Case:
    """A model with the text that everything is decided on, and text to measure on."""

    name: str
    model: nn.Module
    calibration: Sequence[TokenBatch]
    held_out: Sequence[TokenBatch]


Weights = dict[str, Tensor]
"""By dotted path, the (o, i) weights of the layers to be made smaller, in float64."""


def weights_of(model: nn.Module, curvature: ed.Curvature) -> Weights:
    return {
        name: model.get_submodule(name).weight.detach().double()
        for name in curvature
        if name not in curvature.classifier
    }


def factored(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy with some layers as two: W ≈ U V."""
    small = copy_model(model)
    for name, (U, V) in factors.items():
        old = small.get_submodule(name)
        pair = nn.Sequential(
            nn.Linear(V.shape[1], len(V), bias=False),
            nn.Linear(len(V), len(U), bias=old.bias is not None),
        )
        with torch.no_grad():
            pair[0].weight.copy_(V)
            pair[1].weight.copy_(U)
            if old.bias is not None:
                pair[1].bias.copy_(old.bias)
        put(small, name, pair)
    return small


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def whitening(W: Tensor, c: ed.LayerCurvature) -> Tensor:
    """A root of the second moment of what the layer reads (Wang et al. 2024); any gives the same.

    From eigenvalues, because the moment of what comes out of a LayerNorm is singular.
    """
    values, Q = torch.linalg.eigh(c.A.double())
    return Q * values.clamp_min(1e-6 * float(values.mean())).sqrt()


def fisher_rows(W: Tensor, c: ed.LayerCurvature) -> Tensor:
    """The root of each input's Fisher, summed over what it is multiplied by (Hsu et al. 2022)."""
    assert c.diagonal is not None
    return c.diagonal.double().sum((0, 2)).clamp_min(1e-30).sqrt().diag()


def nothing(W: Tensor, c: ed.LayerCurvature) -> Tensor:
    return torch.eye(W.shape[1], dtype=torch.float64)


Metric = Callable[[Tensor, ed.LayerCurvature], Tensor]


def uniform_svd(case: Case, curvature: ed.Curvature, size: float, metric: Metric) -> nn.Module:
    """The SVD of W M in every layer, to the same fraction of its parameters."""
    factors = {}
    for name, W in weights_of(case.model, curvature).items():
        M = metric(W, curvature[name])
        U, s, Vh = torch.linalg.svd(W @ M, full_matrices=False)
        rank = max(1, int(size * W.numel() / sum(W.shape)))
        factors[name] = (U[:, :rank] * s[:rank], torch.linalg.solve(M.T, Vh[:rank].T).T)
    return factored(case.model, factors)


def global_svd(case: Case, curvature: ed.Curvature, size: float, metric: Metric) -> nn.Module:
    """The same where the least energy σ² for its parameters goes first, in whatever layer."""
    weights = weights_of(case.model, curvature)
    parts = {}
    for name, W in weights.items():
        M = metric(W, curvature[name])
        parts[name] = (M, *torch.linalg.svd(W @ M, full_matrices=False))
    worth = torch.cat([p[2].square() / sum(weights[n].shape) for n, p in parts.items()])
    budget = size * sum(W.numel() for W in weights.values())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for threshold in worth.sort().values.tolist():
        factors, used = {}, 0
        for name, (M, U, s, Vh) in parts.items():
            W = weights[name]
            rank = max(1, int((s.square() / sum(W.shape) > threshold).sum()))
            used += min(W.numel(), rank * sum(W.shape))
            if rank * sum(W.shape) < W.numel():
                V = torch.linalg.solve(M.T, Vh[:rank].T).T
                factors[name] = (U[:, :rank] * s[:rank], V)
        if used <= budget:
            break
    return factored(case.model, factors)


def sliced(linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Linear:
    W, b = linear.weight.detach(), linear.bias
    W = W if rows is None else W[rows]
    W = W if columns is None else W[:, columns]
    new = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    with torch.no_grad():
        new.weight.copy_(W)
        if b is not None:
            new.bias.copy_(b if rows is None else b[rows])
    return new


def by_magnitude(case: Case, size: float, *, heads: bool) -> nn.Module | None:
    """A Llama without its MLPs' smallest neurons, by norm, and without its smallest heads.

    Every layer to the same size; a head goes with all queries that share its keys, and neurons
    make up for what whole heads cannot. None where neurons alone do not suffice.
    """
    small = copy_model(case.model)
    for block in small.model.layers:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        of_heads = sum(p.weight.numel() for p in projections)
        of_neurons = 3 * mlp.gate_proj.weight.numel()
        goal = size * (of_heads + of_neurons)
        if heads:
            d = attention.head_dim
            groups = attention.k_proj.weight.shape[0] // d
            kept = max(1, round(size * groups))
            norms = torch.stack(
                [p.weight.detach().reshape(groups, -1).square().sum(1) for p in projections[:3]]
                + [attention.o_proj.weight.detach().T.reshape(groups, -1).square().sum(1)]
            ).sum(0)
            left = norms.topk(kept).indices.sort().values
            wide = torch.arange(attention.q_proj.weight.shape[0]).reshape(groups, -1)[left]
            thin = torch.arange(groups * d).reshape(groups, -1)[left]
            attention.q_proj = sliced(attention.q_proj, wide.flatten(), None)
            attention.k_proj = sliced(attention.k_proj, thin.flatten(), None)
            attention.v_proj = sliced(attention.v_proj, thin.flatten(), None)
            attention.o_proj = sliced(attention.o_proj, None, wide.flatten())
            of_heads = of_heads * kept // groups
        neurons = len(mlp.gate_proj.weight)
        kept = int((goal - of_heads) / of_neurons * neurons)
        if kept < 1:
            return None
        norms = (
            mlp.gate_proj.weight.detach().square().sum(1)
            + mlp.up_proj.weight.detach().square().sum(1)
            + mlp.down_proj.weight.detach().square().sum(0)
        )
        left = norms.topk(kept).indices.sort().values
        mlp.gate_proj = sliced(mlp.gate_proj, left, None)
        mlp.up_proj = sliced(mlp.up_proj, left, None)
        mlp.down_proj = sliced(mlp.down_proj, None, left)
    return small


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(case: Case, curvature: ed.Curvature, size: float) -> nn.Module:
    layers = sum(W.numel() for W in weights_of(case.model, curvature).values())
    whole = parameters(case.model)
    return ed.compress(
        case.model,
        case.calibration,
        budget=ed.Budget(params=1 - (1 - size) * layers / whole),
        loss="causal_lm",
        curvature=curvature,
        eval_data=case.calibration[:1],
        progress=False,
    ).model


def candidates(
    case: Case, curvature: ed.Curvature, size: float
) -> Iterator[tuple[str, Callable[[], nn.Module | None]]]:
    yield "ours, auto", lambda: ours(case, curvature, size)
    for label, metric in (
        ("SVD", nothing),
        ("Fisher-weighted SVD", fisher_rows),
        ("input-whitened SVD", whitening),
    ):
        yield label, lambda metric=metric: uniform_svd(case, curvature, size, metric)
    yield (
        "input-whitened SVD, global energy",
        lambda: global_svd(case, curvature, size, whitening),
    )
    if hasattr(case.model, "model") and hasattr(case.model.model, "layers"):
        yield "magnitude, neurons", lambda: by_magnitude(case, size, heads=False)
        yield "magnitude, heads and neurons", lambda: by_magnitude(case, size, heads=True)


def distilled(case: Case, small: nn.Module) -> nn.Module:
    """KL from the original on the calibration text, without labels; the same for all."""
    small = copy_model(small)
    ed.finetune(
        small, case.calibration, DISTILLED, original=case.model, loss="causal_lm", progress=False
    )
    return small


def per_token(model: nn.Module, case: Case) -> float:
    found = ed.evaluate(model, case.held_out, loss="causal_lm", progress=False)
    assert found.loss_per_position is not None
    return found.loss_per_position


def curvature_of(case: Case) -> ed.Curvature:
    """With channels where they can be traced: of a GPT-2 they cannot."""
    estimate = partial(
        ed.estimate_curvature, case.model, case.calibration, loss="causal_lm", progress=False
    )
    try:
        return estimate(also=("patches", "gradients", "channels"))
    except ed.ChannelError:
        return estimate(also=("patches", "gradients"))


def run(
    case: Case, sizes: Sequence[float], distil_at: Sequence[float], methods: str, out: Path
) -> None:
    said = {k: v for k, v in asdict(DISTILLED).items() if k in ("epochs", "learning_rate", "clip")}
    said["optimizer"] = "AdamW, one cycle"
    base = per_token(case.model, case)
    curvature = curvature_of(case)
    layers = sum(W.numel() for W in weights_of(case.model, curvature).values())
    for size in sizes:
        for label, make in candidates(case, curvature, size):
            if methods not in label:
                continue
            torch.manual_seed(0)
            start = time.perf_counter()
            small = make()
            if small is None:
                continue
            seconds = time.perf_counter() - start
            cut = per_token(small, case)
            row = {
                "model": case.name,
                "size": size,
                "method": label,
                "left": 1 - (parameters(case.model) - parameters(small)) / layers,
                "base": base,
                "base_perplexity": math.exp(base),
                "loss": cut,
                "perplexity": math.exp(cut),
                "distilled": per_token(distilled(case, small), case) if size in distil_at else None,
                "tokens": sum(int(b["attention_mask"].sum()) for b in case.calibration),
                "seed": 0,
                "seconds": round(seconds, 1),
            }
            print(row, flush=True)
            head = {"command": COMMAND, "distilled": said}
            add_row(out, head, row, ("model", "size", "method"))


def stories(path: str) -> list[str]:
    text = Path(path).read_text(encoding="utf-8")
    return [story for story in text.split("\n<|endoftext|>\n") if story.strip()]


def story_case(folder: str, text: str, held_out: str) -> Case:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, test = (
        text_batches(tokenizer, stories(path), length=LENGTH, batch_size=10)
        for path in (text, held_out)
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Case(Path(folder).name, model, calibration, test)


def character_case(folder: str, text: str) -> Case:
    from transformers import GPT2LMHeadModel

    characters = json.loads((Path(folder) / "characters.json").read_text(encoding="utf-8"))
    known = {c: k for k, c in enumerate(characters)}
    ids = torch.tensor([known[c] for c in Path(text).read_text(encoding="utf-8")])
    train, test = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    at = torch.randint(len(train) - 128, (600,), generator=torch.Generator().manual_seed(0))
    blocks = torch.stack([train[k : k + 128] for k in at.tolist()])
    measured = test[: len(test) // 128 * 128].reshape(-1, 128)[:400]
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    return Case(Path(folder).name, plain_linears(model), as_batches(blocks), as_batches(measured))


def as_batches(blocks: Tensor) -> list[TokenBatch]:
    return [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in blocks.split(20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["stories", "characters"])
    parser.add_argument("--model", required=True, help="a folder of transformers")
    parser.add_argument("--text", required=True, help="to decide and distil on")
    parser.add_argument("--held-out", help="to measure on; characters: the last tenth of the text")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--distil-at", type=float, nargs="*", default=SIZES, help="of the sizes")
    parser.add_argument("--methods", default="", help="only those with this in their name")
    here = Path(__file__).parent / "results" / "language_models.json"
    parser.add_argument("--out", type=Path, default=here)
    options = parser.parse_args()
    if options.kind == "stories":
        case = story_case(options.model, options.text, options.held_out)
    else:
        case = character_case(options.model, options.text)
    run(case, options.sizes, options.distil_at, options.methods, options.out)


if __name__ == "__main__":
    main()
