"""What an evaluation of a language model costs over bare transformers: greedy answers, and multiple choice.

    python scripts/bench_generation.py --model DIR --data-root DIR [--rows 64] [--new-tokens 64] [--batch-size 16]

    answers   GSM8K's test questions: ours with the texts that it makes of the tokens, against `model.generate` on the
              same batches; "with the loss" adds the forward over the true answers that an evaluation makes as well
    choices   ARC-Easy's test questions: the log-likelihoods of all choices, a prompt read once, against one batched
              forward over prompts and choices as whole texts

Both sides take turns within one process and have to give the same tokens and the same numbers. Times are the process's
CPU time: with one thread that is what a clock would show on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from harness.registry import make_task
from harness.spec import Limits
from harness.splits import make_splits
from harness.task import Batch
from tasks.causal import tokenizer_of
from tasks.choices import EncodedChoices, log_likelihoods
from tasks.greedy import generated
from tasks.pairs import decoded
from tasks.sequences import padded, tensor


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        answers(options)
        choices(options)


def batches_of(options: argparse.Namespace, task: Any) -> tuple[Any, list[list[int]], Any]:
    """(encoded test rows, rows of each batch, the model), batches as an evaluation makes them."""
    rows = make_splits(task, options.data_root, Limits(None, options.rows)).evaluation["test"]
    encoded = task.encode(rows, options.model)
    order = np.argsort(task.lengths(encoded), kind="stable").tolist()
    few = [order[first : first + options.batch_size] for first in range(0, len(order), options.batch_size)]
    return encoded, few, task.backbone(options.model).module.eval()


def answers(options: argparse.Namespace) -> None:
    """Greedy answers."""
    task: Any = make_task("gsm8k", {"max_response": options.new_tokens})
    encoded, few, model = batches_of(options, task)
    batches = [task.collate(encoded, rows, None) for rows in few]
    tokenizer = tokenizer_of(model)
    end = tokenizer.eos_token_id

    def bare(batch: Batch) -> Any:
        prompts = batch.inputs["prompt_ids"]
        settings = {"do_sample": False, "max_new_tokens": options.new_tokens, "pad_token_id": tokenizer.pad_token_id}
        mask = batch.inputs["prompt_mask"]
        return model.generate(input_ids=prompts, attention_mask=mask, **settings)[:, prompts.shape[1] :]

    def ours(batch: Batch) -> Any:
        ids = generated(model, tokenizer, batch, end, options.new_tokens)
        decoded(tokenizer, [row[: row.index(end)] if end in row else row for row in ids.tolist()])
        return ids

    sides = {"generate": bare, "ours": ours, "with the loss": lambda batch: task.predict(model, batch)}
    found = timed(sides, batches, options.repeats)
    assert all(torch.equal(one, two) for one, two in zip(found["generate"], found["ours"], strict=True))
    print(
        f"  {options.rows} questions, {options.new_tokens} new tokens, batches of {options.batch_size}: the same tokens"
    )


def choices(options: argparse.Namespace) -> None:
    """Log-likelihoods of choices."""
    task: Any = make_task("multiple_choice/arc_easy", {})
    encoded, few, model = batches_of(options, task)
    batches = [(task.collate(encoded, rows, None), whole_texts(encoded, rows)) for rows in few]

    def kept(batch: Any, given: torch.Tensor) -> torch.Tensor:
        """Of logits the log-likelihoods: the logits of all batches would fill the memory."""
        if given.dim() == 1:
            return given
        ids, _, scored = batch[1]
        logs = given[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logs * scored[:, 1:]).sum(1)

    sides: dict[str, Callable[[Any], Any]] = {
        "forward": lambda batch: model(input_ids=batch[1][0], attention_mask=batch[1][1], use_cache=False).logits,
        "ours": lambda batch: log_likelihoods(model, batch[0]),
    }
    found = timed(sides, batches, options.repeats, kept)
    largest = max(float((one - two).abs().max()) for one, two in zip(found["forward"], found["ours"], strict=True))
    size = f"{options.rows} questions, batches of {options.batch_size}"
    print(f"  {size}: the log-likelihoods differ by at most {largest:.1e}")


def whole_texts(encoded: EncodedChoices, questions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, which are the choices' tokens) of prompts with their choices, a row each."""
    contexts = [encoded.contexts[encoded.context_of[choice]] for of_one in encoded.of(questions) for choice in of_one]
    parts = [encoded.choices[choice] for of_one in encoded.of(questions) for choice in of_one]
    wholes = [np.concatenate(pair) for pair in zip(contexts, parts, strict=True)]
    ids, mask = padded(wholes, int(encoded.padding[0]))
    first = np.array([len(context) for context in contexts])[:, None]
    return tensor(ids), tensor(mask), tensor((np.arange(ids.shape[1]) >= first) & mask)


def timed(
    sides: dict[str, Callable[[Any], Any]],
    batches: Sequence[Any],
    repeats: int,
    kept: Callable[[Any, Any], Any] = lambda batch, given: given,
) -> dict[str, list[Any]]:
    """What is `kept` of what each side gives for each batch; their times are printed, over that of the first."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    for repeat in range(repeats):
        for place, batch in enumerate(batches):
            turns = list(sides.items())
            for name, run in turns if (repeat + place) % 2 else reversed(turns):
                started = time.process_time()
                given = run(batch)
                seconds[name] += time.process_time() - started
                if not repeat:
                    found[name].append(kept(batch, given))
    bare = next(iter(seconds.values()))
    for name, spent in seconds.items():
        print(f"{name:<14} {spent / repeats:8.2f} s   x {spent / bare:.3f}")
    return found


if __name__ == "__main__":
    main()
