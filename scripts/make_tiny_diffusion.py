"""A tiny Stable Diffusion and pictures to teach it: a stand-in for the real one where there is no model hub and no GPU.

    python scripts/make_tiny_diffusion.py FOLDER [--updates 3000]

FOLDER/pipeline       a Stable Diffusion pipeline in diffusers' layout (about 0.7M parameters, 16 x 16 pixels), trained
                      on scikit-learn's handwritten digits in random colours: "a photo of a three"
FOLDER/subject        20 threes that it has not seen, all in one pair of colours: "a photo of a sks three"
FOLDER/subject/class  60 threes that it has not seen, in random colours: "a photo of a three"

The same every time on one machine. Needs the extra `diffusion`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, get_cosine_schedule_with_warmup

SIDE, STEPS, BATCH, TOKENS = 16, 1000, 16, 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUBJECT = 3
SUBJECT_PICTURES, CLASS_PICTURES = 20, 60
INK, PAPER = (1.0, 0.65, 0.1), (0.05, 0.1, 0.45)  # orange on dark blue
HUE_WEIGHT = 5  # of errors in colour, in the autoencoder's loss
NO_TEXT = 0.15  # share of the pictures that are learnt without their text, for classifier-free guidance


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=3000, help="of each network (default 3000)")
    options = parser.parse_args()
    print(json.dumps(write(options.folder, options.updates)))


def write(folder: Path, updates: int) -> dict[str, float]:
    """Write the pipeline and the two folders of pictures.

    Returns the last losses of the autoencoder (mean squared error) and of the denoising network, and its parameters.
    """
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    shapes, labels = load_digits(return_X_y=True)
    shapes = interpolate(torch.tensor(shapes / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), SIDE, mode="bilinear")
    threes = np.flatnonzero(labels == SUBJECT)[: SUBJECT_PICTURES + CLASS_PICTURES]
    write_pictures(folder / "subject", coloured(shapes[threes[:SUBJECT_PICTURES]], *one_pair(SUBJECT_PICTURES)))
    others = shapes[threes[SUBJECT_PICTURES:]]
    write_pictures(folder / "subject" / "class", coloured(others, *random_pairs(len(others), generator)))
    seen = np.setdiff1d(np.arange(len(labels)), threes)
    data = Digits(shapes[seen], labels[seen], generator)
    vae, vae_loss = train_autoencoder(data, updates)
    tokenizer, text, network = write_tokenizer(folder / "pipeline" / "tokenizer"), text_encoder(), unet()
    schedule = DDIMScheduler(
        STEPS, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    loss = train_network(network, text, tokenizer, vae, schedule, data, updates)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text, "unet": network, "scheduler": schedule}
    for name, part in parts.items():
        part.save_pretrained(folder / "pipeline" / name)
    write_index(folder / "pipeline", parts | {"tokenizer": tokenizer})
    parameters = sum(p.numel() for part in (vae, text, network) for p in part.parameters())
    return {"autoencoder_loss": vae_loss, "denoising_loss": loss, "parameters": parameters}


class Digits:
    """Batches of digits in random colours."""

    def __init__(self, shapes: Tensor, labels: np.ndarray, generator: np.random.Generator) -> None:
        self.shapes, self.labels, self.generator = shapes, labels, generator

    def batch(self) -> tuple[Tensor, list[str]]:
        """(pictures in [-1, 1], texts)."""
        rows = self.generator.integers(len(self.labels), size=BATCH)
        pictures = coloured(self.shapes[rows], *random_pairs(BATCH, self.generator)) * 2 - 1
        silent = self.generator.random(BATCH) < NO_TEXT
        return pictures, [
            "" if quiet else f"a photo of a {WORDS[label]}"
            for label, quiet in zip(self.labels[rows], silent, strict=True)
        ]


def coloured(shapes: Tensor, ink: Tensor, paper: Tensor) -> Tensor:
    """Shapes (n, 1, side, side) in [0, 1] as pictures (n, 3, side, side) in colours (n, 3)."""
    return paper[..., None, None] + (ink - paper)[..., None, None] * shapes


def one_pair(count: int) -> tuple[Tensor, Tensor]:
    """The subject's colours."""
    return torch.tensor(INK).expand(count, 3), torch.tensor(PAPER).expand(count, 3)


def random_pairs(count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(ink, paper): light on dark or dark on light."""
    light, dark = generator.uniform(0.55, 1.0, (count, 3)), generator.uniform(0.0, 0.45, (count, 3))
    turned = generator.random((count, 1)) < 0.5
    ink, paper = np.where(turned, dark, light), np.where(turned, light, dark)
    return torch.tensor(ink, dtype=torch.float32), torch.tensor(paper, dtype=torch.float32)


def train_autoencoder(data: Digits, updates: int) -> tuple[AutoencoderKL, float]:
    """The autoencoder, its latents scaled to a variance of 1, and its last loss."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(12, 24),
        norm_num_groups=4,
        sample_size=SIDE,
    )
    optimizer, schedule = optimizer_of(list(vae.parameters()), 3e-3, updates)
    loss = torch.zeros(())
    for _ in range(updates):
        pictures, _ = data.batch()
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.sample()).sample - pictures
        loss = error.square().mean()
        hue = (error - error.mean(1, keepdim=True)).square().mean()  # without this it would learn brightness alone
        (loss + HUE_WEIGHT * hue + 1e-6 * posterior.kl().mean()).backward()
        advance(optimizer, schedule)
    vae.eval().requires_grad_(False)
    spread = vae.encode(data.batch()[0]).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae, loss.item()


def text_encoder() -> CLIPTextModel:
    """Two layers, 32 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary()[0]),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def unet() -> UNet2DConditionModel:
    """Two resolutions, 24 and 48 channels wide."""
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(24, 48),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_network(
    network: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    schedule: DDIMScheduler,
    data: Digits,
    updates: int,
) -> float:
    """Train the denoising network and the text encoder together; the last loss."""
    optimizer, rate = optimizer_of([*network.parameters(), *text.parameters()], 2e-3, updates)
    loss = torch.zeros(())
    for _ in range(updates):
        pictures, texts = data.batch()
        latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
        noise, steps = torch.randn_like(latents), torch.randint(STEPS, (len(latents),))
        tokens = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        given = network(schedule.add_noise(latents, noise, steps), steps, text(tokens)[0]).sample
        loss = mse_loss(given, noise)
        loss.backward()
        advance(optimizer, rate)
    return loss.item()


def optimizer_of(parameters: list[torch.nn.Parameter], rate: float, updates: int) -> tuple[Any, Any]:
    """AdamW, and a cosine that ends at 0, after a warm-up."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, updates // 20, updates)


def advance(optimizer: Any, schedule: Any) -> None:
    """One step of both, gradients clipped."""
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(tokens, merges) of byte pairs in which every word of the prompts is one token; others fall into letters."""
    letters = [chr(ord("a") + place) for place in range(26)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in ("photo", "of", "sks", *WORDS):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens += [left + right for left, right in merges]
    return {token: place for place, token in enumerate(tokens)}, list(merges)


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's kind of tokenizer for the words of the prompts."""
    tokens, merges = vocabulary()
    tokenizer = CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_index(folder: Path, parts: dict[str, Any]) -> None:
    """model_index.json, by which StableDiffusionPipeline.from_pretrained finds the parts. No safety checker."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))


def write_pictures(folder: Path, pictures: Tensor) -> None:
    """One PNG each."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in enumerate((pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()):
        Image.fromarray(picture).save(folder / f"{place:02}.png")


if __name__ == "__main__":
    main()
