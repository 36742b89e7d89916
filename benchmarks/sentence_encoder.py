"""A sentence encoder (BERT) made smaller without labels: how alike its embeddings stay.

Sentences of the calibration text decide everything; the cosines are of sentences of another text.
Run, with a folder of a `BertModel` and its tokenizer,

    python benchmarks/sentence_encoder.py --model FOLDER --text TRAIN.txt --held-out TEST.txt

Rows of other models, sizes and methods in the results file stay.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from language_models import factored, nothing, parameters, weights_of, whitening
from recording import add_row
from torch import Tensor, nn

import eigendamage as ed
from eigendamage.integrations.huggingface import MeanPooled, TokenBatch, text_batches

COMMAND = "python benchmarks/sentence_encoder.py --model FOLDER --text TEXT --held-out TEXT"


def sentences(path: str, count: int) -> list[str]:
    """The first sentences of a length that says something."""
    text = Path(path).read_text(encoding="utf-8")
    found = [s.strip() for line in text.splitlines() for s in line.split(" . ")]
    return [s for s in found if 40 <= len(s) <= 200 and "=" not in s][:count]


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[TokenBatch]) -> Tensor:
    return torch.cat([model(**batch) for batch in batches])


def likeness(original: Tensor, small: Tensor) -> dict[str, float]:
    """The mean cosine of each sentence with itself, and how alike the neighbourhoods are."""
    cosine = torch.cosine_similarity(original, small).mean()
    orders = []
    for found in (original, small):
        unit = torch.nn.functional.normalize(found)
        alike = (unit @ unit.T).fill_diagonal_(-2.0)
        orders.append(alike.topk(10).indices)
    shared = (orders[0].unsqueeze(2) == orders[1].unsqueeze(1)).any(2).float().mean()
    return {"cosine": float(cosine), "neighbours": float(shared)}


def by_svd(model: nn.Module, curvature: ed.Curvature, size: float, whitened: bool) -> nn.Module:
    factors = {}
    for name, W in weights_of(model, curvature).items():
        M = (whitening if whitened else nothing)(W, curvature[name])
        U, s, Vh = torch.linalg.svd(W @ M, full_matrices=False)
        rank = max(1, int(size * W.numel() / sum(W.shape)))
        factors[name] = (U[:, :rank] * s[:rank], torch.linalg.solve(M.T, Vh[:rank].T).T)
    return factored(model, factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder of transformers")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--sentences", type=int, default=500)
    here = Path(__file__).parent / "results" / "sentence_encoder.json"
    parser.add_argument("--out", type=Path, default=here)
    given = parser.parse_args()
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = MeanPooled(AutoModel.from_pretrained(given.model)).eval()
    data, test = (
        text_batches(tokenizer, sentences(path, given.sentences), length=64, batch_size=20)
        for path in (given.text, given.held_out)
    )
    original = embeddings(model, test)
    start = time.perf_counter()
    curvature = ed.estimate_curvature(
        model, data, loss="mse", also=("patches", "channels"), progress=False
    )
    shared = time.perf_counter() - start
    layers = sum(W.numel() for W in weights_of(model, curvature).values())

    def ours(size: float) -> nn.Module:
        budget = ed.Budget(params=1 - (1 - size) * layers / parameters(model))
        return ed.compress(
            model,
            data,
            budget=budget,
            loss="mse",
            curvature=curvature,
            eval_data=data[:1],
            progress=False,
        ).model

    methods: dict[str, Callable[[float], nn.Module]] = {
        "ours, auto": ours,
        "SVD": lambda size: by_svd(model, curvature, size, False),
        "input-whitened SVD": lambda size: by_svd(model, curvature, size, True),
    }
    for size in given.sizes:
        for label, make in methods.items():
            start = time.perf_counter()
            small = make(size)
            row = {
                "size": size,
                "method": label,
                "left": 1 - (parameters(model) - parameters(small)) / layers,
                **likeness(original, embeddings(small, test)),
                "sentences": len(original),
                "seconds": round(time.perf_counter() - start, 1),
                "curvature_seconds": round(shared, 1),
                "seed": 0,
            }
            print(row, flush=True)
            add_row(given.out, {"command": COMMAND}, row, ("size", "method"))


if __name__ == "__main__":
    main()
