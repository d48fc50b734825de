"""Pictures and prompts as the denoising network takes them: latents, text states, noise and time steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.task import Batch, Examples
from tasks.dreambooth import pipeline

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from tasks.dreambooth.pipeline import Schedule

AT_ONCE = 8  # pictures through the autoencoder at once, to bound memory


@dataclass(frozen=True)
class Encoded:
    """One split, made once by the frozen autoencoder and text encoder.

    latents: (rows, kinds, 2, channels, height, width), mean and standard deviation, scaled as the network takes them;
    kinds are the row's own picture and, with prior preservation, the class pictures that stand beside it.
    texts: (prompts, tokens, width); prompt: (rows,) the place of each row's own, class_prompt that of the class.
    noise: (rows,) seeds of the evaluation's noise, from the picture alone.
    """

    latents: Tensor
    texts: Tensor
    prompt: Tensor
    class_prompt: int
    noise: tuple[int, ...]
    schedule: Schedule

    def evaluation(self, rows: Sequence[int], draws: int) -> Batch:
        """`draws` noisy versions of each row's mean latents, the same every time: time steps in the middle of as many
        equal spans of the process, noise from the row's own seed."""
        import torch

        steps = ((torch.arange(draws) + 0.5) * len(self.schedule.kept) / draws).long().expand(len(rows), -1)
        clean = self.latents[list(rows), :1, 0].expand(-1, draws, -1, -1, -1)
        shape = clean.shape[1:]
        seeded = [torch.Generator().manual_seed(self.noise[row]) for row in rows]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeded])
        return self._batch(clean, noise, steps, self.prompt[list(rows), None].expand(-1, draws))

    def training(self, rows: Sequence[int], generator: torch.Generator) -> Batch:
        """A noisy version of each row's latents at a random time step, and one of a class picture drawn for the row
        where there are any: (rows, 1 or 2, ...)."""
        import torch

        own, others = self.latents[list(rows), :1], self.latents[list(rows), 1:]
        prompt = self.prompt[list(rows), None]
        if others.shape[1]:
            drawn = torch.randint(others.shape[1], (len(rows),), generator=generator)
            own = torch.cat([own, others[torch.arange(len(rows)), drawn, None]], dim=1)
            prompt = torch.cat([prompt, torch.full_like(prompt, self.class_prompt)], dim=1)
        mean, deviation = own.unbind(2)
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        steps = torch.randint(len(self.schedule.kept), clean.shape[:2], generator=generator)
        return self._batch(clean, torch.randn(clean.shape, generator=generator), steps, prompt)

    def _batch(self, clean: Tensor, noise: Tensor, steps: Tensor, prompt: Tensor) -> Batch:
        """The network's inputs, and as labels what it should give."""
        noisy, target = diffused(clean, noise, steps, self.schedule)
        return Batch({"sample": noisy, "timestep": steps, "encoder_hidden_states": self.texts[prompt]}, target)


def diffused(clean: Tensor, noise: Tensor, steps: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """The latents after so many steps of noise (Ho et al., 2020, equation 4), and the network's target: the noise, or
    the velocity (Salimans and Ho, 2022, appendix D). `steps`: the leading dimensions of the others."""
    kept = schedule.kept[steps][(...,) + (None,) * (clean.dim() - steps.dim())]
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    target = noise if schedule.prediction == "epsilon" else signal * noise - spread * clean
    return signal * clean + spread * noise, target


def encode(examples: Examples, model: str, class_prompt: str | None) -> Encoded:
    """The split's pictures and prompts through the model's autoencoder and text encoder, on a GPU where there is one.

    Raises InputError where the model has no such parts, or the pictures are too small for it.
    """
    import numpy as np
    import torch

    pictures = np.asarray(examples.columns["picture"])[:, None]
    if "class_pictures" in examples.columns:
        pictures = np.concatenate([pictures, np.asarray(examples.columns["class_pictures"])], axis=1)
    prompts = list(dict.fromkeys([*examples.columns["prompt"], *([class_prompt] if class_prompt else [])]))
    digests = [hashlib.sha256(picture.tobytes()).digest() for picture in pictures[:, 0]]
    return Encoded(
        latents=_latents(pictures, model),
        texts=pipeline.text_states(model, prompts),
        prompt=torch.tensor([prompts.index(prompt) for prompt in examples.columns["prompt"]]),
        class_prompt=prompts.index(class_prompt) if class_prompt else 0,
        noise=tuple(int.from_bytes(digest[:8], "big") >> 1 for digest in digests),
        schedule=pipeline.load_schedule(model),
    )


def _latents(pictures: np.ndarray, model: str) -> Tensor:
    """Mean and standard deviation of the autoencoder's posterior, scaled; (..., 2, channels, height, width)."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae: Any = pipeline.load_vae(model).to(device)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if pictures.shape[2] % factor:
        raise InputError(f"resolution = {pictures.shape[2]} should be a multiple of {factor} for model '{model}'")
    pixels = torch.from_numpy(pictures.reshape(-1, *pictures.shape[2:])).permute(0, 3, 1, 2)
    found = []
    with torch.no_grad():
        for some in pixels.split(AT_ONCE):
            posterior = vae.encode(some.to(device) / 127.5 - 1).latent_dist
            mean = (posterior.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            found.append(torch.stack([mean, posterior.std * vae.config.scaling_factor], dim=1).cpu())
    return torch.cat(found).unflatten(0, pictures.shape[:2])
