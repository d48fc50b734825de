"""A tiny causal language model and something to teach it, for trying `generation` without a download.

    python scripts/make_tiny_language_model.py DIR [--updates 600]

DIR/model: a Llama of 2 layers x 64 from a configuration, taught to copy three to five words. DIR/pairs.jsonl: words and
their reverse, 1,200 pairs to fine-tune it on. Less than a minute on one core; the same every time on one machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ("sun", "moon", "star", "tree", "leaf", "root", "rain", "snow", "wind", "fire", "stone", "sand", "lake", "hill")
SPECIAL = ("[PAD]", "[UNK]", "[END]")
PAIRS, BATCH = 1200, 32


def main() -> None:
    """Write the model and the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    tokenizer = write_tokenizer(options.folder / "model")
    model = make_model()
    loss = teach_copying(model, tokenizer, generator, options.updates)
    model.save_pretrained(options.folder / "model")
    with (options.folder / "pairs.jsonl").open("w") as stream:
        for _ in range(PAIRS):
            words = draw(generator)
            row = {"prompt": " ".join(words), "response": " ".join(reversed(words))}
            stream.write(json.dumps(row) + "\n")
    print(f"{options.folder}: copies with a loss of {loss:.3f}; {PAIRS} pairs to be learnt")


def draw(generator: np.random.Generator) -> list[str]:
    """Three to five words."""
    return generator.choice(WORDS, size=generator.integers(3, 6)).tolist()


def write_tokenizer(folder: Path) -> Any:
    """One token a word; "=" ends a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "=", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[END]",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return fast


def make_model() -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 1 + len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("[END]"),
        pad_token_id=SPECIAL.index("[PAD]"),
    )
    return LlamaForCausalLM(config)


def teach_copying(model: Any, tokenizer: Any, generator: np.random.Generator, updates: int) -> float:
    """The last loss of `updates` AdamW steps on "words = words [END]", rows of one length a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for _ in range(updates):
        size = int(generator.integers(3, 6))
        rows = [generator.choice(WORDS, size=size).tolist() for _ in range(BATCH)]
        texts = [" ".join([*words, "=", *words, "[END]"]) for words in rows]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = ids.clone()
        labels[:, : size + 1] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
