"""Models of transformers: inputs by name, outputs in its own classes, caches among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import eigendamage as ed

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4))


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 20, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"attention_mask": mask, "input_ids": ids}  # not in the order of forward's signature


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("build", [_llama, _bert])
def test_plain(build: type[nn.Module], tmp_path: Path) -> None:
    written = ed.export(build(), tmp_path / "plain", _batch(), format="plain", progress=False)
    assert written.max_difference < 1e-5
    # Llama's output has its cache beside the logits, which is no tensor and is left out.
    expected = {_llama: ("logits",), _bert: ("last_hidden_state", "pooler_output")}
    assert written.outputs == expected[build]
    assert "transformers" not in (tmp_path / "plain" / "model.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("build", [_llama, _bert])
def test_onnx(build: type[nn.Module], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    model = build()
    written = ed.export(model, tmp_path / "model.onnx", _batch(), progress=False)
    assert written.max_difference < 1e-5
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask"}
    assert {i.shape[0] for i in session.get_inputs()} == {"batch"}
