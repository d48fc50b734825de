"""The parts of a Stable Diffusion pipeline in diffusers' folder layout: where they are, and how they are loaded.

Only safetensors are read, no code of a model runs, and the safety checker is neither fetched nor built.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from tasks import pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model"
FILES = (  # patterns, of the main weights only: no fp16 or non_ema copies
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "unet/config.json",
    f"unet/{WEIGHTS}.safetensors",
    f"unet/{WEIGHTS}-0*.safetensors",  # in pieces, with their index
    f"unet/{WEIGHTS}.safetensors.index.json",
    "vae/config.json",
    f"vae/{WEIGHTS}.safetensors",
)
NEEDED = tuple(name for name in FILES if "*" not in name and not name.startswith(f"unet/{WEIGHTS}"))
NETWORK, PREDICTIONS = "UNet2DConditionModel", ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """The diffusion process. kept: float32 (steps,), the share of the image's variance that is left after each step,
    alpha-bar of Ho et al. (2020). prediction: what the network is trained to give, noise or velocity."""

    kept: Tensor
    prediction: str


def folder_of(model: str) -> Path:
    """The pipeline's folder: a local one, or of a Hub id, of which only `FILES` are fetched.

    Raises InputError without diffusers, where there is no such model, a part of it is missing, or it is another
    architecture than Stable Diffusion 1 or 2.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise InputError("dreambooth needs diffusers: pip install 'rank-adaptive-harness[diffusion]'")
    folder = pretrained.local_folder(model) or pretrained.download(model, FILES)
    for name in NEEDED:
        if not (folder / name).is_file():
            present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise InputError(
                f"model '{model}' is not a Stable Diffusion pipeline with safetensors: '{name}' is missing; it holds: "
                f"{present}",
                model,
            )
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"model '{model}' has no tokenizer: tokenizer/tokenizer.json or vocab.json is missing", model)
    _check_architecture(folder, model)
    return folder


def fingerprint(model: str) -> str:
    """SHA-256 over the pipeline's files, 16 hexadecimal digits; the same for a copy in another place."""
    folder = folder_of(model)
    return pretrained.content_hash(sorted({path for pattern in FILES for path in folder.glob(pattern)}))


def load_unet(model: str, *, meta: bool = False) -> nn.Module:
    """The denoising network in float32; on the meta device, no weights are read. Raises InputError where its weights
    are missing, damaged or not its own."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = folder_of(model)
    if meta:
        with torch.device("meta"):
            network: nn.Module = UNet2DConditionModel.from_config(_settings(folder / "unet" / "config.json"))
        return network
    return _loaded(UNet2DConditionModel, folder, "unet", model)


def load_vae(model: str) -> Any:
    """The autoencoder (diffusers' AutoencoderKL) in float32, frozen, in evaluation mode."""
    from diffusers import AutoencoderKL

    return _loaded(AutoencoderKL, folder_of(model), "vae", model).eval().requires_grad_(False)


def load_schedule(model: str) -> Schedule:
    """The diffusion process that the model was trained with."""
    from diffusers import DDPMScheduler

    scheduler = _read(lambda: DDPMScheduler.from_pretrained(folder_of(model), subfolder="scheduler"), model)
    return Schedule(scheduler.alphas_cumprod, scheduler.config.prediction_type)


def load_sampler(model: str) -> Any:
    """DDIM (Song et al., 2021), deterministic, over the model's own noise schedule."""
    from diffusers import DDIMScheduler

    return _read(lambda: DDIMScheduler.from_pretrained(folder_of(model), subfolder="scheduler"), model)


def text_states(model: str, prompts: list[str]) -> Tensor:
    """The frozen text encoder's last hidden states of the prompts, float32 (prompts, tokens, width).

    Raises InputError for a prompt that is longer than the model reads.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    pretrained.quieten()
    folder = folder_of(model)
    tokenizer = _read(lambda: CLIPTokenizer.from_pretrained(folder / "tokenizer"), model)
    encoder: Any = _loaded(CLIPTextModel, folder, "text_encoder", model).eval()
    longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > longest:
            raise InputError(f"prompt '{prompt}' has {length} tokens; model '{model}' reads at most {longest}", prompt)
    tokens = tokenizer(prompts, padding="max_length", max_length=longest, return_tensors="pt")
    with torch.no_grad():
        states: Tensor = encoder(tokens.input_ids)[0]
    return states


def _loaded(builder: Any, folder: Path, part: str, model: str) -> Any:
    """A part in float32. Raises InputError where weights are missing, damaged or another network's."""
    options = {"subfolder": part, "use_safetensors": True, "output_loading_info": True}
    network, loading = _read(lambda: builder.from_pretrained(folder, **options), model)
    if loading["missing_keys"]:
        lost = sorted(loading["missing_keys"])
        raise InputError(f"the weights of model '{model}' lack {len(lost)} tensors of its {part} (first: '{lost[0]}')")
    return network.float()


def _read(load: Callable[[], Any], model: str) -> Any:
    """What `load` gives. Raises InputError where a file is damaged."""
    from diffusers.utils import logging
    from safetensors import SafetensorError

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model '{model}' cannot be loaded: {reason}", model) from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"'{path}' is damaged ({error})") from None
    if not isinstance(settings, dict):
        raise InputError(f"'{path}' is damaged (it should hold an object)")
    return settings


def _check_architecture(folder: Path, model: str) -> None:
    """Stable Diffusion 1 and 2 alone: one text encoder, and a UNet that takes latents, a time step and the text."""
    network, autoencoder, text, schedule = (
        _settings(folder / part / name)
        for part, name in (
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("text_encoder", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    )
    channels, prediction = autoencoder.get("latent_channels"), schedule.get("prediction_type", PREDICTIONS[0])
    problems = [
        (network.get("_class_name") != NETWORK, f"its unet is a {network.get('_class_name')}, not a {NETWORK}"),
        (
            network.get("addition_embed_type") or network.get("class_embed_type"),
            "its unet takes inputs beside latents, time step and text (SDXL and others do)",
        ),
        (
            {network.get("in_channels"), network.get("out_channels")} != {channels},
            f"its unet takes {network.get('in_channels')} and gives {network.get('out_channels')} channels, where "
            f"latents have {channels} (an inpainting model?)",
        ),
        (
            network.get("cross_attention_dim") != text.get("hidden_size"),
            f"its unet reads text states {network.get('cross_attention_dim')} wide, the text encoder's are "
            f"{text.get('hidden_size')} wide",
        ),
        (prediction not in PREDICTIONS, f"prediction_type = {prediction}; allowed are {', '.join(PREDICTIONS)}"),
    ]
    for wrong, reason in problems:
        if wrong:
            raise InputError(f"model '{model}' is not Stable Diffusion 1 or 2: {reason}", model)
