"""Pictures drawn from a denoising network, for a look at what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.dreambooth import pipeline

if TYPE_CHECKING:
    from torch import Tensor, nn

GAP = 2  # pixels between the pictures of a grid


def sample(
    network: nn.Module, model: str, prompts: list[str], count: int, side: int, steps: int, guidance: float
) -> np.ndarray:
    """`count` pictures of each prompt, uint8 (prompts, count, side, side, 3).

    DDIM with classifier-free guidance (Ho and Salimans, 2022). Picture i of every prompt starts from the same noise,
    that of seed i, so that models can be compared picture by picture. The network is left in evaluation mode.
    """
    import torch

    network.eval()
    vae = pipeline.load_vae(model)
    device, channels = next(network.parameters()).device, vae.config.latent_channels
    height = side // 2 ** (len(vae.config.block_out_channels) - 1)
    start = [torch.randn((channels, height, height), generator=torch.Generator().manual_seed(i)) for i in range(count)]
    empty, *texts = pipeline.text_states(model, ["", *prompts]).to(device)
    vae.to(device)
    rows = []
    for text in texts:
        sampler = pipeline.load_sampler(model)
        sampler.set_timesteps(steps)
        latents = torch.stack(start).to(device) * sampler.init_noise_sigma
        rows.append(_decoded(vae, _denoised(network, sampler, latents, empty, text, guidance)))
    return np.stack(rows)


def _denoised(network: Any, sampler: Any, latents: Tensor, empty: Tensor, text: Tensor, guidance: float) -> Tensor:
    """The latents (count, channels, height, width) after all of the sampler's steps."""
    import torch

    states = torch.cat([part.expand(len(latents), -1, -1) for part in (empty, text)])
    with torch.no_grad():
        for step in sampler.timesteps:
            scaled = sampler.scale_model_input(torch.cat([latents, latents]), step)
            timestep = step.to(latents.device).expand(len(scaled))
            given = network(sample=scaled, timestep=timestep, encoder_hidden_states=states).sample
            without, with_text = given.chunk(2)
            guided = without + guidance * (with_text - without)
            latents = sampler.step(guided, step, latents).prev_sample
    return latents


def _decoded(vae: Any, latents: Tensor) -> np.ndarray:
    """uint8 (count, side, side, 3), one after the other to bound memory."""
    import torch

    with torch.no_grad():
        plain = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels = torch.cat([vae.decode(one[None]).sample for one in plain])
    bright = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bright.permute(0, 2, 3, 1).cpu().numpy()


def write_grid(pictures: np.ndarray, path: Path) -> None:
    """One PNG of pictures (rows, columns, side, side, 3), with a white gap between them."""
    from PIL import Image

    rows, columns, side = pictures.shape[:3]
    spaced = np.full((rows, columns, side + GAP, side + GAP, 3), 255, dtype=np.uint8)
    spaced[:, :, :side, :side] = pictures
    grid = spaced.transpose(0, 2, 1, 3, 4).reshape(rows * (side + GAP), columns * (side + GAP), 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid[:-GAP, :-GAP]).save(path)
