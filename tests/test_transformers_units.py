"""Heads and neurons of Hugging Face's transformers go, and what is left is a model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eigendamage as ed
from eigendamage import errors
from eigendamage.batch import as_batch
from eigendamage.integrations.huggingface import plain_linears
from eigendamage.layers import (
    ChannelGraph,
    channels_of,
    find_channels,
    remove_units,
    zero_inputs,
)

transformers = pytest.importorskip("transformers", reason="Hugging Face's transformers are missing")

VOCABULARY, WORDS = 96, 12


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def _vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=5,
        initializer_range=0.3,
    )
    return transformers.ViTForImageClassification(config).eval()


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=44,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return plain_linears(transformers.GPT2LMHeadModel(config).eval())


def _words(examples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, VOCABULARY, (examples, WORDS), generator=generator)}


def _pictures(examples: int) -> Tensor:
    return torch.randn(examples, 3, 16, 16, generator=torch.Generator().manual_seed(1))


Inputs = Callable[[int], Any]
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs, str, Sequence[str], str]] = {
    "llama": (
        _llama,
        _words,
        "model.layers.{}.self_attn.q_proj",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "model.layers.{}.mlp.gate_proj",
    ),
    "gpt2": (
        _gpt2,
        _words,
        "transformer.h.{}.attn.c_attn",
        ("c_attn", "c_proj"),
        "transformer.h.{}.mlp.c_fc",
    ),
    "bert": (
        _bert,
        _words,
        "bert.encoder.layer.{}.attention.self.query",
        ("query", "key", "value", "dense"),
        "bert.encoder.layer.{}.intermediate.dense",
    ),
    "vit": (
        _vit,
        _pictures,
        "vit.layers.{}.attention.q_proj",
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "vit.layers.{}.mlp.fc1",
    ),
}


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def _found(name: str) -> ChannelGraph:
    model, inputs, *_ = MODELS[name]
    return find_channels(model(), as_batch(inputs(4), 0, torch.device("cpu")))


def _outputs(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return (model(**x) if isinstance(x, dict) else model(x)).logits


def _macs(model: nn.Module, x: Any) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        _outputs(model, x)
    return counter.get_total_flops() // 2


def _compress(model: nn.Module, **options: Any) -> ed.Compressed:
    inputs = [_words(8 * k + 8) for k in range(5)]
    batches = [{"input_ids": each["input_ids"][-8:]} for each in inputs]
    return ed.compress(model, batches, progress=False, **options)


def test_every_head_and_neuron_is_found(name: str) -> None:
    _, _, heads, projections, neurons = MODELS[name]
    graph = _found(name)
    for number in range(2):
        head = graph.groups[heads.format(number)]
        members = [m.module.rpartition(".")[2] for m in (*head.producers, *head.readers)]
        assert (head.size, members) == (4, list(projections))
        assert graph.groups[neurons.format(number)].size == 44
    extra = {"bert.pooler.dense"} if name == "bert" else set()
    assert len(graph.groups) == 4 + len(extra)


def test_removing_units_is_not_reading_them(name: str) -> None:
    make, inputs, *_ = MODELS[name]
    model, x, graph = make(), inputs(4), _found(name)
    units = {key: list(range(1, group.size, 2)) for key, group in graph.groups.items()}
    smaller, blind = copy.deepcopy(model), copy.deepcopy(model)
    remove_units(smaller, graph, units)
    for key, gone in units.items():
        for member in graph.groups[key].readers:
            zero_inputs(blind.get_submodule(member.module), channels_of(member, gone))
    expected = _outputs(blind, x)
    torch.testing.assert_close(_outputs(smaller, x), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(_outputs(model, x), expected, rtol=0, atol=1e-2)


def test_the_price_in_macs_is_what_is_counted(name: str) -> None:
    make, inputs, heads, _, neurons = MODELS[name]
    model, x, graph = make(), inputs(1), _found(name)
    curvature = ed.estimate_curvature(
        model, [inputs(8)], also=("patches", "channels"), progress=False
    )
    menus = ed.make_menus(model, curvature, actions=("channels",), progress=False)
    for key, gone in ((heads.format(0), 2), (neurons.format(1), 9)):
        menu = menus.groups[key]
        at = menu.counts.tolist().index(gone)
        smaller = copy.deepcopy(model)
        remove_units(smaller, graph, {key: menu.dropped(at)})
        saved = menu.whole.macs - menu.costs[at].macs
        assert saved == pytest.approx(_macs(model, x) - _macs(smaller, x))


@pytest.mark.parametrize("actions", [("channels",), ("low-rank", "blocks", "channels")])
def test_a_budget_is_met(actions: Sequence[Any]) -> None:
    model = _llama()
    before = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    found = _compress(model, budget=ed.Budget(macs=0.6), actions=actions, repair=True)
    x = _words(2)
    left = _macs(found.model, x) / _macs(model, x)
    assert left <= 0.6
    assert left == pytest.approx(found.report.macs[1] / found.report.macs[0], rel=1e-6)
    assert left > 0.5
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.config.to_dict() == config


def test_what_counts_heads_is_in_the_plan(tmp_path: Path) -> None:
    model = _gpt2()
    data = [_words(16)]
    curvature = ed.estimate_curvature(
        model, data, also=("patches", "channels"), ignore="*mlp*", progress=False
    )
    menus = ed.make_menus(model, curvature, actions=("channels",), progress=False)
    plan = ed.make_plan(model, curvature, ed.Budget(macs=0.8), menus=menus)
    plan.save(tmp_path / "plan.json")
    plan = ed.Plan.load(tmp_path / "plan.json")
    smaller = ed.apply_plan(model, plan, curvature)
    widths = {c.module: c.after for c in plan.counters if c.attribute == "split_size"}
    assert widths
    for path, width in widths.items():
        attention = smaller.get_submodule(path)
        assert attention.split_size == width < 32
        assert attention.c_attn.out_features == 3 * width
        assert attention.num_heads == width // 8
        assert model.get_submodule(path).split_size == 32
    assert bool(_outputs(smaller, _words(2)).isfinite().all())
    model.transformer.h[0].attn.split_size = model.transformer.h[1].attn.split_size = 31
    with pytest.raises(errors.MismatchError, match=r"split_size.* is 31, the plan is for 32"):
        ed.apply_plan(model, plan, curvature)


def test_what_is_left_of_a_llama_generates_with_its_cache_and_trains() -> None:
    model = _llama()
    graph = _found("llama")
    remove_units(model, graph, {key: [0, 2] for key in graph.groups})
    words = _words(2)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = model.generate(words, **options)
    assert with_cache.shape == (2, WORDS + 8)
    assert torch.equal(with_cache, model.generate(words, use_cache=False, **options))
    cache = model(words, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {2}
    model.train()
    model(words, labels=words).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
