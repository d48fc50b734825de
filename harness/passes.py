"""Passes over training batches that a method makes itself: gradients of frozen weights, inputs of layers.

They are what a start from the data is made of (`Adaptation.prepare`), and may be made in any other hook. Every batch
uses one of the budget, through the `Step`; draw them from a stream, one by one where a method may stop early:

    batches = (data.draw("all") for _ in range(32))
    gradients = mean_weight_gradients(step, self.model, self.layers, batches)

Layers are modules by the names that the backbone has for them. Look them up when the method starts, before an adapter
is put around them: `{name: backbone.module.get_submodule(name) for name in backbone.targets(None)}`. An adapter keeps
the layer that it is put around, and calls it.

A pass runs in the mode that the model is in, as a training batch does: with dropout, which draws from torch's global
generator, and with BatchNorm layers taking statistics into their buffers, where a task lets them. `evaluation_mode` is
without both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.backbone import as_matrix
from harness.method import Indices, Step

Layers = Mapping[str, nn.Module]
Take = Callable[[str, Tensor], None]


@contextmanager
def taking_weight_gradients(layers: Layers, take: Take) -> Iterator[None]:
    """Within it every backward pass hands over the gradients of the layers' weights, one after the other as it finishes
    them. No batch is used: entered in `before_forward` and left in `before_step`, it serves a method that follows the
    gradient of every training batch.

    `take(name, gradient)`: called for every layer that the loss reaches, the last one first. The gradient is exact, a
    matrix (outputs, inputs) like `Backbone.shape`, in the weight's dtype. It is the caller's, to keep, change or reduce
    to what is needed (a norm, a projection, a sum). Nothing else refers to it, so that one gradient is in memory at a
    time. With micro batches, `take` gets a part for each of them, and the parts sum to the gradient of the batch's mean
    loss.

    The weights are frozen ones: what a backward pass gives one that trains is taken from its optimizer too. Afterwards
    they require gradients, and have them, as before. Raises ValueError where two layers share a weight.
    """
    weights = {layer.get_parameter("weight"): (name, layer) for name, layer in layers.items()}
    if len(weights) < len(layers):
        raise ValueError("two of the layers share their weight")

    def hand_over(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        name, layer = weights[weight]  # type: ignore[index]
        take(name, as_matrix(layer, gradient))

    before = [(weight, weight.requires_grad, weight.grad) for weight in weights]
    with ExitStack() as hooks:
        try:
            for weight in weights:
                weight.requires_grad_(True).grad = None
                hooks.enter_context(weight.register_post_accumulate_grad_hook(hand_over))
            yield
        finally:
            for weight, required, gradient in before:
                weight.requires_grad_(required).grad = gradient


def weight_gradients(step: Step, model: nn.Module, layers: Layers, batches: Iterable[Indices], take: Take) -> int:
    """Put batches through the model, and the gradients of the layers' weights to `take`, as `taking_weight_gradients`
    does.

    Returns the number of batches. No other gradient is computed, and none that is there changes. Raises RuntimeError
    where the budget has no batch left, ValueError where two layers share a weight.
    """
    number = 0
    with torch.enable_grad(), _frozen(model), taking_weight_gradients(layers, take):
        for batch in batches:
            step.backward(batch)
            number += 1
    return number


def mean_weight_gradients(
    step: Step, model: nn.Module, layers: Layers, batches: Iterable[Indices]
) -> dict[str, Tensor]:
    """The gradient of each layer's weight, (outputs, inputs), as the mean over the batches; 0 where no loss reaches it.

    In memory: the result, as large as the weights, and one gradient more. Where that is too much, give
    `weight_gradients` a `take` that keeps less. Otherwise as `weight_gradients`.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient

    number = weight_gradients(step, model, layers, batches, add)
    return {
        name: sums[name].div_(number)
        if name in sums
        else torch.zeros_like(as_matrix(layer, layer.get_parameter("weight")))
        for name, layer in layers.items()
    }


@torch.no_grad()
def observe_inputs(
    step: Step, model: nn.Module, layers: Layers, batches: Iterable[Indices], see: Callable[[str, Tensor], None]
) -> None:
    """Put batches forward through the model and show what each layer gets.

    `see(name, rows)`: called whenever a layer is called: of most, once a batch, or once a micro batch; never of one
    whose weight the model uses without a call. rows: (number of rows, features). A row is a token, padding left out
    (by the model's `attention_mask`), an example, or the patch of an image that a convolution multiplies:
    `rows @ as_matrix(layer, layer.weight).T` is what the layer computes, but for the bias. Rows may be a view of what
    the model goes on with: copy what is kept.

    No gradients. Raises RuntimeError where the budget has no batch left, ValueError for a convolution in groups or with
    a padding other than a number of zeros.
    """

    def showing(name: str, rows: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def show(layer: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, _patches(layer, args[0]) if isinstance(layer, nn.Conv2d) else rows(args[0]))

        return show

    with ExitStack() as stack:
        rows = stack.enter_context(without_padding(model))
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(showing(name, rows)))
        for batch in batches:
            step.backward(batch)


@contextmanager
def without_padding(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, the function that it gives takes what a linear layer gets or gives of the batch that is on its way
    through the model, (..., features), as (number of rows, features), padding left out. It may be a view.

    Padding is known by the model's `attention_mask`, (examples, tokens). Values of another number of rows, as of pooled
    examples, and batches of models without a mask, are taken whole.
    """
    mask: Tensor | None = None
    real: Tensor | None = None  # places of what is no padding, found once a batch: a device is waited for

    def keep_mask(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        nonlocal mask, real
        given = inputs.get("attention_mask")
        mask = given if isinstance(given, Tensor) and given.dim() == 2 else None
        real = None if mask is None else mask.flatten().nonzero().flatten()

    def rows(values: Tensor) -> Tensor:
        found = values.flatten(0, -2)
        if mask is None or real is None:
            return found
        whole = values.dim() == 3 and values.shape[:2] == mask.shape
        flattened = values.dim() == 2 and len(values) == mask.numel()  # by the model, as OPT does
        return found[real] if whole or flattened else found

    with model.register_forward_pre_hook(keep_mask, with_kwargs=True):
        yield rows


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it no dropout, and no statistics taken; after it every module is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter requires a gradient."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)


def _patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """What a convolution's kernels are multiplied with, (examples times places, C_in kH kW)."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"the inputs of {layer} are no rows: it has groups, or a padding that is no number of zeros")
    patches = functional.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)
