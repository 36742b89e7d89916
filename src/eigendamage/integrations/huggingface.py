"""Hugging Face transformers: models with plain Linear layers, batches of tokens, embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigendamage.errors import DataError, FileFormatError, MismatchError, MissingFileError, warn
from eigendamage.integrations._conv1d import plain_linears
from eigendamage.integrations._extras import required
from eigendamage.integrations._pretrained import (
    from_pretrained,
    model_class,
    save_pretrained,
)

__all__ = [
    "MeanPooled",
    "TokenBatch",
    "UnusedWeights",
    "block_batches",
    "from_pretrained",
    "plain_linears",
    "pretrained_model",
    "save_pretrained",
    "text_batches",
]

TokenBatch = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, both (batch, tokens) of int64."""


class UnusedWeights(UserWarning):
    """A checkpoint holds weights that its model has no place for."""


def pretrained_model(path: str) -> nn.Module:
    """A model of transformers with its weights, in eval mode, with plain Linear layers.

    The class is the first of the configuration's ``architectures``. Weights are read from
    safetensors alone, and no code from the folder is run.

    Args:
        path: a folder that ``save_pretrained`` wrote, ``~`` at its start being the home folder, or
            an id of the hub (network).

    Raises:
        ExtraError: if transformers is not installed.
        MissingFileError: if a path that is absolute or starts with a dot or ``~`` is not there;
            the hub is not asked then.
        FileFormatError: if there is no such model, it has no safetensors, or its configuration
            names no model of transformers.
        MismatchError: if the file lacks weights of the model that are tied to none that it has.

    Warns:
        UnusedWeights: if it has weights that the model does not take. They are left out.
    """
    given, path = path, _expanded(path)
    # Else transformers would take it for the name of a model of the hub, and ask there.
    local = path.startswith((".", "~")) or Path(path).is_absolute()
    if local and not Path(path).exists():
        raise MissingFileError(
            f"hf:{given}: there is no folder '{path}'; give one that save_pretrained wrote, or an "
            f"id of the hub such as openai-community/gpt2"
        )
    transformers: Any = required("transformers", "huggingface")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of whatever kind: transformers checks little of what it reads
        raise FileFormatError(f"hf:{path} cannot be read: {_first_line(error)}") from error
    try:
        kind = model_class(transformers, config)
    except FileFormatError as error:
        raise FileFormatError(
            f"hf:{path}: {error}; build the model yourself and give module:callable"
        ) from error
    try:
        model, loaded = kind.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise FileFormatError(
            f"hf:{path} cannot be read as {kind.__name__} from safetensors: {_first_line(error)}"
        ) from error
    if missing := loaded["missing_keys"]:
        raise MismatchError(
            f"hf:{path} lacks {len(missing)} weights of {kind.__name__} ({_some(missing)}); they "
            f"would be random. Take the model that was trained as {kind.__name__}"
        )
    if unused := loaded["unexpected_keys"]:
        warn(
            f"hf:{path} has {len(unused)} weights that {kind.__name__} does not take "
            f"({_some(unused)}); they are left out. If it was trained as another model, name that "
            f"under architectures in its config.json",
            UnusedWeights,
        )
    return plain_linears(model).eval()


def _expanded(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # there is no such user
        return path


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(f"'{name}'" for name in ordered[:3]) + (", …" if len(ordered) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def text_batches(
    tokenizer: Any, texts: Iterable[str], *, length: int, batch_size: int
) -> list[TokenBatch]:
    """Texts as padded batches, in their order, each text one example.

    Args:
        tokenizer: of transformers. Special tokens are added as it does by default. If it has no
            token for padding, token 0 takes its place, which the mask excludes.
        texts: one example each; longer ones are cut.
        length: the most tokens of an example.
        batch_size: examples a batch. Each batch is padded on the right to its longest.

    Raises:
        DataError: if there is no text, or one without a token.
    """
    _require_positive(length=length, batch_size=batch_size)
    if isinstance(texts, str):
        raise DataError("texts is one text; give a list, or cut a long one by block_batches")
    rows: list[list[int]] = [
        tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts
    ]
    if not rows:
        raise DataError("there is no text to make batches of")
    for index, row in enumerate(rows):
        if not row:
            raise DataError(f"text {index} has no token; leave out empty texts")
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    return [
        _padded(rows[start : start + batch_size], padding)
        for start in range(0, len(rows), batch_size)
    ]


def block_batches(tokenizer: Any, text: str, *, length: int, batch_size: int) -> list[TokenBatch]:
    """One long text in blocks of a fixed number of tokens, without padding and special tokens.

    What is left at the end, less than a block, is dropped.

    Args:
        tokenizer: of transformers.
        text: any text.
        length: tokens of a block, which is one example.
        batch_size: examples a batch; the last may have fewer.

    Raises:
        DataError: if the text has fewer tokens than one block.
    """
    _require_positive(length=length, batch_size=batch_size)
    # Without a warning that the whole is longer than the model can read: it reads blocks.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(encoded, dtype=torch.int64)
    blocks = ids[: len(ids) // length * length].reshape(-1, length)
    if not len(blocks):
        raise DataError(f"the text has {len(ids)} tokens, fewer than one block of {length}")
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in blocks.split(batch_size)
    ]


class MeanPooled(nn.Module):
    """An encoder without a head, as a model whose output is one embedding a text.

    The mean of the last hidden states over the tokens that are not padding, (batch, width). With
    it ``loss="mse"`` compresses an encoder without labels; the layers' paths start with
    ``encoder.``, and ``.encoder`` of the compressed model is the smaller encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Float[Tensor, "n d"]:
        """The embeddings of a batch of token ids."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            return hidden.mean(1)
        weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


def _padded(rows: Sequence[list[int]], padding: int) -> TokenBatch:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"{name} is {count}; it must be at least 1")
