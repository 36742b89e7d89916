"""Train a small GPT-2 on the characters of a text, in minutes on a CPU.

    python scripts/train_char_gpt.py TEXT.txt FOLDER

The first nine tenths of the text are trained on, the last tenth is measured on. FOLDER gets the
model as transformers writes it (safetensors) and `characters.json`, the character of each token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH, BATCH = 128, 16


def config(characters: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=characters,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )


def held_out_loss(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """Mean loss of a character, in nats, on blocks of the held-out text."""
    blocks = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:400]
    model.eval()
    with torch.no_grad():
        losses = [float(model(b, labels=b).loss) * len(b) for b in blocks.split(50)]
    return sum(losses) / len(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8")
    characters = sorted(set(text))
    token = {c: k for k, c in enumerate(characters)}
    ids = torch.tensor([token[c] for c in text])
    train, test = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    model = GPT2LMHeadModel(config(len(characters)))
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps
    )
    for step in range(options.steps):
        model.train()
        at = torch.randint(len(train) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([train[k : k + LENGTH] for k in at])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0 or step + 1 == options.steps:
            print(f"step {step + 1}: held-out {held_out_loss(model, test):.4f}", flush=True)
    model.eval()
    model.save_pretrained(options.folder)
    (options.folder / "characters.json").write_text(json.dumps(characters), encoding="utf-8")


if __name__ == "__main__":
    main()
