"""The callback of Hugging Face's Trainer: a tiny BERT that is compressed while it is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eigendamage as ed

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from eigendamage.integrations.trainer import CompressionCallback  # noqa: E402

_FEW = partial(ed.compress, method="eigendamage", progress=False)


class _Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of tokens; the label is whether the first is large."""

    def __init__(self) -> None:
        self.ids = torch.randint(1, 40, (48, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": int(ids[0] > 20)}


def _trainer(folder: Path, callback: CompressionCallback, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=40, intermediate_size=32, **sizes)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_steps=8,
        learning_rate=1e-3,
        **options,
    )
    model = transformers.BertForSequenceClassification(config)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=_Texts(), callbacks=[callback]
    )


def test_rounds_at_steps_make_a_model_smaller_that_goes_on_training(tmp_path: Path) -> None:
    callback = CompressionCallback(ed.Budget(macs=0.6), at_steps=(2, 5), batches=2, compressor=_FEW)
    trainer = _trainer(tmp_path, callback, max_steps=8)
    model = trainer.model
    before = sum(p.numel() for p in model.parameters())
    trainer.train()
    assert trainer.model is model
    assert len(callback.reports) == 2
    first, last = callback.reports
    assert last.macs[1] <= 0.6 * first.macs[0]
    after = sum(p.numel() for p in model.parameters())
    assert (first.parameters[0], last.parameters) == (before, (first.parameters[1], after))
    assert after < before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(0 < loss < 5 for loss in losses)
    groups = trainer.optimizer.param_groups
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(groups) == 2  # with decay and without
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert all(int(trainer.optimizer.state[p]["step"]) >= 3 for p in held)  # all were trained
    assert model.training
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
    assert (tmp_path / "checkpoint-8" / "optimizer.pt").is_file()


def test_rounds_at_epochs_and_those_that_are_missed(tmp_path: Path) -> None:
    callback = CompressionCallback(
        ed.Budget(params=0.8), at_epochs=(1, 3), data=_batches(), compressor=_FEW
    )
    trainer = _trainer(tmp_path, callback, num_train_epochs=2, save_strategy="no")
    with pytest.warns(UserWarning, match=r"ended before 1 of 2 rounds, .* \[3\]"):
        trainer.train()
    (report,) = callback.reports
    assert report.examples == 16
    assert report.budget == f"params {0.8**0.5:g}"


def test_a_second_training_with_no_round_left_is_refused(tmp_path: Path) -> None:
    callback = CompressionCallback(
        ed.Budget(params=0.9), at_steps=[1], data=_batches(), compressor=_FEW
    )
    trainer = _trainer(tmp_path, callback, max_steps=2, save_strategy="no")
    trainer.train()
    with pytest.raises(ed.EigenDamageError, match=r"all 1 rounds .* make a new callback"):
        trainer.train()


def _batches() -> list[dict[str, Any]]:
    ids = _Texts().ids
    return [{"input_ids": ids[:8]}, {"input_ids": ids[8:16]}]


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("n_gpu", 2), ("deepspeed", "z")])
def test_a_training_that_is_shared_out_is_refused(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = CompressionCallback(ed.Budget(params=0.8), at_steps=[1], compressor=_FEW)
    trainer = _trainer(tmp_path, callback, max_steps=1)
    monkeypatch.setattr(type(trainer.args), name, value, raising=False)
    monkeypatch.delitem(vars(trainer.args), name, raising=False)
    with pytest.raises(ed.EigenDamageError, match="shares the training out"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
