"""Tiny models and data in the published layouts, written into a folder that the test gives."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILLERS = ("the", "a", "film", "story", "plot", "scene", "actor", "camera", "music", "ending", "was", "is", "and", "of")
SIGNS = ("good", "bad", "odd")  # the word that gives a text's class away
MARKS = ("one", "two", "three", "four", "five")  # their share gives a pair's similarity
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GLUE_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
GLUE_CLASSES = {"mnli": 3, "stsb": 0}  # the others have 2
ROWS, EVALUATION_ROWS = 60, 24
PAIRS = tuple((f"{'camera ' * (n % 5)}was good", f"the film {n % 3}") for n in range(ROWS))
SIZES = {
    "vocab_size": len(SPECIAL + FILLERS + SIGNS + MARKS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def write_all(folder: Path) -> Path:
    """data/ (a data root), bert/ and resnet/ (models)."""
    write_data_root(folder / "data")
    write_bert(folder / "bert")
    write_resnet(folder / "resnet")
    return folder


def write_bert(folder: Path, *, pooler: bool = True, seed: int = 0) -> Path:
    """A BERT of 2 layers x 32 with random weights and a tokenizer of a few words."""
    import torch
    from transformers import BertConfig, BertModel

    write_tokenizer(folder)
    torch.manual_seed(seed)
    BertModel(BertConfig(**SIZES), add_pooling_layer=pooler).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with BERT's special tokens and segment ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + FILLERS + SIGNS + MARKS
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def write_resnet(folder: Path, *, mean: Sequence[float] | None = (0.5, 0.4, 0.3)) -> Path:
    """A ResNet of two bottleneck stages with random weights and a head for 3 classes."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder)
    if mean is not None:
        settings = {"image_mean": list(mean), "image_std": [0.2, 0.2, 0.2]}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_data_root(folder: Path) -> Path:
    """All eight GLUE tasks and CIFAR-10 in the Hub's layout, a few dozen rows each."""
    for number, task in enumerate(GLUE_COLUMNS):
        for split in glue_splits(task):
            rows = glue_rows(task, ROWS if split == "train" else EVALUATION_ROWS, seed=100 * number + len(split))
            write_parquet(folder / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet", rows)
    place = folder / "uoft-cs" / "cifar10" / "plain_text"
    write_parquet(place / "train-00000-of-00001.parquet", cifar_rows(ROWS, seed=1), hub_features=True)
    write_parquet(place / "test-00000-of-00001.parquet", cifar_rows(EVALUATION_ROWS, seed=2))
    return folder


def glue_splits(task: str) -> tuple[str, ...]:
    """The published splits that carry labels."""
    return ("train", "validation_matched", "validation_mismatched") if task == "mnli" else ("train", "validation")


def glue_rows(task: str, count: int, seed: int) -> dict[str, list[Any]]:
    """Columns of a GLUE task; a word of the last text gives the label away. A pair's first text recurs 3 times."""
    generator = np.random.default_rng(seed)
    columns = GLUE_COLUMNS[task]
    classes = GLUE_CLASSES.get(task, 2)
    rows: dict[str, list[Any]] = {name: [] for name in (*columns, "label", "idx")}
    opening = ""
    for row in range(count):
        if row % 3 == 0:
            opening = f"{_filler(generator)} {MARKS[row % 5]}"
        if classes:
            label: float = row % classes
            sign = SIGNS[int(label)]
        else:
            label = float(np.float32(generator.uniform(0, 5)))
            sign = " ".join(MARKS[: round(label)])
        texts = [opening, f"{_filler(generator)} {sign}"][-len(columns) :]
        for name, value in zip(rows, [*texts, label, row], strict=True):
            rows[name].append(value)
    return rows


def _filler(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(FILLERS, size=generator.integers(3, 9)))


def cifar_rows(count: int, seed: int) -> dict[str, list[Any]]:
    """32 x 32 PNG files as the Hub stores them; the class sets the brightness."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"img": [], "label": []}
    for row in range(count):
        label = row % 10
        pixels = (generator.integers(0, 30, (32, 32, 3)) + 20 * label).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, format="PNG")
        rows["img"].append({"bytes": encoded.getvalue(), "path": None})
        rows["label"].append(label)
    return rows


def write_parquet(path: Path, rows: dict[str, list[Any]], *, hub_features: bool = False) -> None:
    """One parquet file; `hub_features` adds the metadata that the datasets library writes for CIFAR-10."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"idx": pa.int32(), "img": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in rows.items()})
    if hub_features:
        features = {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_llama(folder: Path, *, seed: int = 0) -> Path:
    """A Llama of 2 layers x 32 with random weights, the tokenizer of `write_bert` with an end token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "[SEP]", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("[SEP]"),
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_pairs(folder: Path, pairs: Iterable[tuple[str, str]] = PAIRS) -> Path:
    """The file of these prompts and responses."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in pairs))
    return path
