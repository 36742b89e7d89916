"""Small models that pages begin with, where a reader has his own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from eigendamage.zoo._resnet import ResNet

LETTERS = "abcdefghijklmnopqrst "


def residual(widths: tuple[int, int, int]) -> nn.Module:
    """The bundled network with other widths, one block a stage and random weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(1, widths, in_channels=1, stem_stride=2, shortcut="projection").eval()


def tokenizer() -> Any:
    """One token a letter, and one to pad with."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    vocabulary = {"?": 0} | {letter: index for index, letter in enumerate(LETTERS, start=1)}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="?", unk_token="?")


def texts(count: int) -> list[str]:
    """Words of random letters, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator))
        for length in torch.randint(6, 12, (count,), generator=generator)
    ]


def llama_folder(folder: str) -> str:
    """A folder with a Llama of one block and its tokenizer; the name of the folder."""
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(Path(folder))
    tokenizer().save_pretrained(Path(folder))
    return folder


def gpt2() -> nn.Module:
    """A GPT-2 of one block, of the same tokens."""
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(LETTERS) + 1, n_positions=16, n_embd=16, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert_folder(folder: str) -> str:
    """A folder with a BERT of one block; the name of the folder."""
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(LETTERS) + 1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(Path(folder))
    return folder


def vit() -> nn.Module:
    """A ViT of one block for images of 3 x 8 x 8 and three classes."""
    import transformers  # noqa: PLC0415

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()
