"""The options of `advise`, and what its help says around them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """\
From the records of a sweep: the smallest configuration, by adapter parameters, that is not worse than the best by the
margin or more; for each task, and over all of them.

It is chosen on the holdout, by a test over seeds and examples against every other configuration. The chance to advise
one that is truly worse by the margin or more is at most 5 %. Where nothing is shown, nothing is advised, and you read
how many seeds might show it. Its score on the evaluation split is told afterwards: it had no say in the choice.

Two files are written: TASK.json, a configuration of PEFT (LoraConfig(**json.load(open(FILE)))), where the adapter is a
LoRA, and TASK.toml, a sweep that trains it here."""

EXAMPLES = """\
examples:
  python -m harness run --methods lora --grid lora.rank=1,2,4,8,16 --tasks glue/cola --seeds 5
  python -m harness advise --margin 0.01
  python -m harness advise --tasks glue/cola --margin 0.02 --to lora/adapter_config.json

One seed is refused: it cannot tell a small configuration from a lucky one. More seeds show smaller margins. So do fewer
configurations (--methods), if they are named before you have looked at the scores."""


def add(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Give the command's parser its own options and its texts. `path`: reads a path that is given."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--margin", default="0.01", help="what is no loss, in the score's unit (default 0.01)")
    parser.add_argument("--to", type=path, metavar="FILE", help="of a single advice (default DIR/advice/TASK.json)")
