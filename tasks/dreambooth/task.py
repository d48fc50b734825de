"""Stable Diffusion taught one subject, called as dreambooth:PATH: the task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from harness.method import Backbone
from harness.metric import Metric, mean_of
from harness.task import Batch, Examples, Task
from tasks.dreambooth import pipeline
from tasks.dreambooth.pictures import read_pictures

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from tasks.dreambooth.encoding import Encoded

EVALUATION_SHARE = 0.2  # of the pictures, at least one
CLASS_FOLDER = "class"
OUTER = ("conv_in", "conv_out")  # between latents and features: too few channels for a rank

DENOISING_LOSS = mean_of("denoising_loss", lambda losses, perfect: losses - perfect, higher_is_better=False)


class DreamBooth(Task):
    """Stable Diffusion 1 or 2 taught a subject from a few pictures (Ruiz et al., 2023), called as dreambooth:PATH.

    PATH is a folder of the subject's pictures; with class_prompt, its folder `class` holds pictures of the class, and
    every picture of a batch has one of them beside it (prior preservation, equation 2 of the paper).

    The denoising network alone is trained; autoencoder and text encoder are frozen, and there is no head. The layers
    for adapters are the attention's linear layers and every convolution but the first and the last. The score is the
    denoising loss on pictures that were held out, at `draws` fixed time steps and noises each; lower is better.
    Held-out class pictures give `class_denoising_loss`: how far the model forgets what it knew. Needs diffusers.
    """

    default_model: ClassVar[str | None] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    capabilities: ClassVar[tuple[str, ...]] = ("image", "conv2d", "own data")
    measures: ClassVar[tuple[Metric, ...]] = (DENOISING_LOSS,)

    path: str = Field("", description="set by the task's name, dreambooth:PATH")
    instance_prompt: str = Field(min_length=1, description='the subject, with a rare word: "a photo of sks dog"')
    class_prompt: str | None = Field(
        None, min_length=1, description='its class, for prior preservation: "a photo of a dog"; null: none'
    )
    prior_weight: float = Field(1.0, gt=0, description="weight of the loss on class pictures, where there are any")
    resolution: int = Field(512, ge=16, le=2048, multiple_of=8, description="pixels a side, from the middle square")
    draws: int = Field(8, ge=1, le=1000, description="time steps at which each held-out picture is scored")
    samples: int = Field(4, ge=0, le=64, description="pictures drawn of each prompt before and after training")
    sampling_steps: int = Field(50, ge=1, le=1000, description="DDIM steps of a sample")
    guidance: float = Field(7.5, ge=1, description="classifier-free guidance of the samples; 1 is none")

    def load(self, data_root: str | None) -> tuple[Examples, dict[str, Examples]]:
        """Training rows, and evaluation splits "test" and, with class pictures, "class". A label is 0, the loss of a
        perfect network. Every training row carries an equal share of the class pictures. `data_root` is not used."""
        subject, left_out = read_pictures(self.path, self.resolution)
        train, test = _parted(subject)
        evaluation = {"test": _examples(test, self.instance_prompt)}
        columns = {}
        if self.class_prompt is not None:
            pictures, more = read_pictures(f"{self.path}/{CLASS_FOLDER}", self.resolution)
            prior, unseen = _parted(pictures)
            evaluation["class"] = _examples(unseen, self.class_prompt)
            columns["class_pictures"] = _shared_out(prior, len(train))
            left_out += more
        return _examples(train, self.instance_prompt, left_out, **columns), evaluation

    def model_fingerprint(self, model: str | None, *, trust_remote_code: bool = False) -> str:
        return pipeline.fingerprint(self.model_name(model))

    def backbone(self, model: str | None, *, meta: bool = False, trust_remote_code: bool = False) -> Backbone:
        """The denoising network. No code of a model is ever run, whatever `trust_remote_code` says."""
        network = pipeline.load_unet(self.model_name(model), meta=meta)
        return Backbone(network, head=(), layers=layers_of(network))

    def encode(self, examples: Examples, model: str | None) -> Encoded:
        from tasks.dreambooth.encoding import encode

        return encode(examples, self.model_name(model), self.class_prompt)

    def collate(self, encoded: Encoded, rows: Sequence[int], generator: torch.Generator | None) -> Batch:
        """`sample` (rows, n, channels, height, width), `timestep` (rows, n), `encoder_hidden_states` (rows, n, tokens,
        width), and as labels the network's targets, like `sample`. In training n is 1, or 2 with a class picture;
        else `draws`."""
        return encoded.evaluation(rows, self.draws) if generator is None else encoded.training(rows, generator)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> Tensor:
        losses = _losses(
            model, {name: value.flatten(0, 1) for name, value in batch.inputs.items()}, batch.labels.flatten(0, 1)
        )
        kinds = losses.unflatten(0, batch.labels.shape[:2]).mean(0)
        return kinds[0] + self.prior_weight * kinds[1:].sum()

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) each row's mean loss over its draws, taken one after the other to bound memory."""
        import torch

        draws = range(batch.labels.shape[1])
        inputs = [{name: value[:, draw] for name, value in batch.inputs.items()} for draw in draws]
        return torch.stack([_losses(model, inputs[draw], batch.labels[:, draw]) for draw in draws]).mean(0)

    def artifacts(self, model: nn.Module, source: str | None, folder: Path) -> None:
        """samples.png: a row for each prompt, a column for each starting noise."""
        if self.samples == 0:
            return
        from tasks.dreambooth.sampling import sample, write_grid

        prompts = [prompt for prompt in (self.instance_prompt, self.class_prompt) if prompt is not None]
        pictures = sample(
            model, self.model_name(source), prompts, self.samples, self.resolution, self.sampling_steps, self.guidance
        )
        write_grid(pictures, folder / "samples.png")


def _examples(pictures: np.ndarray, prompt: str, left_out: tuple[str, ...] = (), **columns: np.ndarray) -> Examples:
    import numpy as np

    of_each: dict[str, Any] = {"picture": pictures, "prompt": [prompt] * len(pictures), **columns}
    return Examples(of_each, np.zeros(len(pictures), np.float64), left_out=left_out)


def _parted(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pictures to train on, pictures to evaluate), the same every time."""
    import numpy as np

    order = np.random.default_rng(0).permutation(len(pictures))
    cut = max(1, round(EVALUATION_SHARE * len(pictures)))
    return pictures[np.sort(order[cut:])], pictures[np.sort(order[:cut])]


def _shared_out(pictures: np.ndarray, rows: int) -> np.ndarray:
    """(rows, share, side, side, 3): every picture once, some twice where they do not come out even."""
    import numpy as np

    share = -(-len(pictures) // rows)
    return pictures[np.arange(rows * share).reshape(rows, share) % len(pictures)]


def layers_of(network: nn.Module) -> tuple[str, ...]:
    """The attention's linear layers (queries, keys, values, outputs) and the convolutions between the outer two."""
    from diffusers.models.attention_processor import Attention
    from torch import nn

    attention = {
        f"{name}.{part}"
        for name, module in network.named_modules()
        if isinstance(module, Attention)
        for part, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return tuple(
        name
        for name, layer in network.named_modules()
        if name in attention or (isinstance(layer, nn.Conv2d) and name not in OUTER)
    )


def _losses(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """(rows,) mean squared errors of the network's output."""
    error: Tensor = (model(**inputs).sample.float() - targets) ** 2
    return error.flatten(1).mean(1)
