"""Tiny tokenizers of the usual kinds, and a Llama of random weights with one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "the rank adaptive method on a task with many seeds",
    "user and assistant say: </s> is <|im_end|> text\nwas good",
    "приятный фильм, очень, a fine job",
]


def byte_level(*, end: str = "<|endoftext|>", special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Any:
    """As GPT-2's: byte-level BPE, no tokens around a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        backend,
        trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=[end, *special], initial_alphabet=alphabet
        ),
    )
    return wrapped(backend, eos_token=end, additional_special_tokens=list(special))


def sentence_piece(kind: str, *, scheme: str = "first") -> Any:
    """As Llama's ("bpe") or T5's ("unigram"): a sign for the space before a word, "<s>" before a text."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind == "bpe":
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer: Any = trainers.BpeTrainer(vocab_size=150, show_progress=False, special_tokens=special)
    else:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=80, show_progress=False, special_tokens=special, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    _train(backend, trainer)
    if kind == "bpe":
        backend.model = _with_bytes(backend)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return wrapped(backend, **names, additional_special_tokens=special[3:])


def words(vocabulary: list[str]) -> Any:
    """A word each a token; "<unk>", "</s>" and "<pad>" come first."""
    numbers = {word: number for number, word in enumerate(["<unk>", "</s>", "<pad>", *vocabulary])}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def wrapped(backend: Tokenizer, **names: Any) -> Any:
    """The tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **names)


def write_llama(folder: Path, tokenizer: Any, *, positions: int = 128, seed: int = 0) -> str:
    """A Llama of 2 layers x 32 with random weights, and the tokenizer, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _train(backend: Tokenizer, trainer: Any) -> None:
    backend.train_from_iterator(TEXTS * 9, trainer)


def _with_bytes(backend: Tokenizer) -> models.BPE:
    """The trained model with pieces for the bytes of what it does not know."""
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
