"""Models of transformers, tiny and random: from batches of text to a smaller model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigendamage as ed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from eigendamage.integrations.huggingface import (  # noqa: E402
    MeanPooled,
    block_batches,
    plain_linears,
    text_batches,
)

ACTIONS = ("low-rank", "blocks")
VOCABULARY = 24


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert_config() -> Any:
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
    )


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(bert_config()).eval()


def embedder() -> nn.Module:
    torch.manual_seed(0)
    return MeanPooled(transformers.BertModel(bert_config(), add_pooling_layer=False)).eval()


def vit() -> nn.Module:
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


class Letters:
    """As a tokenizer of transformers is called: one token a letter, and none to pad with."""

    pad_token_id = None

    def __call__(
        self,
        text: str,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        verbose: bool = True,
    ) -> dict[str, list[int]]:
        ids = [ord(letter) - ord("a") for letter in text][: max_length if truncation else None]
        return {"input_ids": ids}


def token_data(batches: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(batches):
        mask = torch.ones(3, 7, dtype=torch.int64)
        mask[1, 4:] = 0
        ids = torch.randint(VOCABULARY, (3, 7), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def image_data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(5)]


NETWORKS = {
    "llama": (llama, token_data, "causal_lm"),
    "gpt2": (lambda: plain_linears(gpt2()), token_data, "causal_lm"),
    "bert": (bert, token_data, "cross_entropy"),
    "embeddings": (embedder, token_data, "mse"),
    "vit": (vit, lambda: [{"pixel_values": x} for x in image_data()], "cross_entropy"),
    "vit by position": (vit, image_data, "cross_entropy"),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_auto_makes_a_smaller_model_that_is_called_as_before(name: str) -> None:
    make, data, loss = NETWORKS[name]
    model, batches = make(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = ed.compress(
        model,
        batches,
        budget=ed.Budget(params=0.85),
        loss=loss,
        actions=ACTIONS,
        refine=0,
        progress=False,
    )
    assert result.plan.changed
    assert result.report.final.divergence is not None
    assert result.report.final.divergence > 0
    count = sum(p.numel() for p in result.model.parameters())
    assert count <= 0.85 * sum(p.numel() for p in model.parameters())
    first = batches[0]
    outputs = [m(**first) if isinstance(first, dict) else m(first) for m in (model, result.model)]
    assert type(outputs[0]) is type(outputs[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_channels_of_a_llama_are_found_though_its_rotary_embeddings_go_in_circles() -> None:
    batches = token_data()
    result = ed.compress(
        llama(),
        batches,
        budget=ed.Budget(params=0.9),
        loss="causal_lm",
        actions=("channels",),
        progress=False,
    )
    graph = result.curvature.channels
    assert graph is not None
    members = [m.module for g in graph.groups.values() for m in g.producers]
    assert "model.layers.0.mlp.gate_proj" in members
    assert "model.layers.0.self_attn.q_proj" not in members
    assert result.model(**batches[0]).logits.shape == (3, 7, VOCABULARY)
    # Reports of language models have the perplexity of a token; prices are by example.
    report = result.report
    found = ed.evaluate(result.model, batches, loss="causal_lm", progress=False)
    assert report.final.perplexity == pytest.approx(found.perplexity)
    assert math.log(found.perplexity) == pytest.approx(found.loss * 15 / (5 * (6 + 3 + 6)))


def test_plain_linears_return_what_conv1d_does() -> None:
    model = gpt2()
    plain = plain_linears(model)
    ids = token_data(1)[0]["input_ids"]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    kinds = {type(m).__name__ for m in plain.modules()}
    assert "Conv1D" not in kinds
    assert any(type(m).__name__ == "Conv1D" for m in model.modules())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert set(ed.find_layers(plain).compressible) == {
        f"transformer.h.0.{path}"
        for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_a_model_with_conv1d_is_refused_with_what_to_do() -> None:
    with pytest.raises(ed.NothingToCompressError, match=r"plain_linears\(model\)"):
        ed.compress(gpt2(), token_data(), budget=ed.Budget(params=0.8), progress=False)


def test_heads_of_language_models_stay_unless_asked_for() -> None:
    """A tied head shares its weight; an untied one is the classifier."""
    data = token_data()
    assert "shared" in ed.find_layers(llama(tie_word_embeddings=True)).left_alone["lm_head"]
    model = llama(tie_word_embeddings=False)
    options = {"loss": "causal_lm", "also": ("patches",), "progress": False}
    curvature = ed.estimate_curvature(model, data, **options)
    assert curvature.classifier == ("lm_head",)
    plan = ed.make_plan(model, curvature, ed.Budget(params=0.5), actions=ACTIONS)
    assert plan.layers["lm_head"].action == ed.Keep(reason="it is the classifier")
    asked = replace(curvature, classifier=())
    plan = ed.make_plan(model, asked, ed.Budget(params=0.35), actions=ACTIONS)
    assert plan.layers["lm_head"].changes


def test_texts_are_padded_and_masked() -> None:
    first, second = text_batches(Letters(), ["abcde", "xy", "b"], length=4, batch_size=2)
    assert first["input_ids"].tolist() == [[0, 1, 2, 3], [23, 24, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[1]]


def test_blocks_of_a_text_have_no_padding() -> None:
    batches = block_batches(Letters(), "abcdefgh", length=2, batch_size=3)
    assert [b["input_ids"].tolist() for b in batches] == [[[0, 1], [2, 3], [4, 5]], [[6, 7]]]
    assert all(bool(b["attention_mask"].all()) for b in batches)


def test_bad_texts_are_refused() -> None:
    with pytest.raises(ed.DataError, match="text 1 has no token"):
        text_batches(Letters(), ["a", ""], length=4, batch_size=2)
    with pytest.raises(ed.DataError, match="no text"):
        text_batches(Letters(), [], length=4, batch_size=2)
    with pytest.raises(ed.DataError, match="length is 0"):
        block_batches(Letters(), "abc", length=0, batch_size=2)
    with pytest.raises(ed.DataError, match="fewer than one block of 4"):
        block_batches(Letters(), "abc", length=4, batch_size=2)


def test_an_embedding_does_not_know_of_padding() -> None:
    model = embedder()
    ids = torch.tensor([[5, 6, 7]])
    alone = model(ids)
    more = torch.tensor([[5, 6, 7, 0, 0], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(model(more, mask)[:1], alone)


STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"


@pytest.mark.skipif(not STORIES.exists(), reason="the pretrained Llama is not beside the checkout")
def test_a_pretrained_llama_predicts_its_own_stories() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
    text = (STORIES / "sampled_stories_heldout.txt").read_text()
    stories = [s for s in text.split("\n<|endoftext|>\n") if s.strip()][:12]
    data = text_batches(tokenizer, stories, length=64, batch_size=4)
    found = ed.evaluate(model, data, loss="causal_lm", progress=False)
    with torch.no_grad():
        theirs = sum(
            float(model(**b, labels=b["input_ids"].where(b["attention_mask"] != 0, -100)).loss)
            * int(b["attention_mask"][:, 1:].sum())
            for b in data
        )
    assert found.loss * found.examples == pytest.approx(theirs, rel=1e-5)
    assert 0 < found.loss_per_position < 2.5
