"""The options of `import-peft` and `export`, and what their help says around them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

IMPORT = """\
Results that PEFT reports of its own method comparison (huggingface/peft, method_comparison/MetaMathQA/results), as a
table of their own: peft.md, peft.tex and peft.csv. Everything in it is marked as reported elsewhere, of one run each;
no record is made of it, and no other table, picture or page shows it."""

EXPORT = """\
A run's trained adapter (of a run with --save-adapter) with a model card and its record, as a folder to hand on.

With --as peft-experiment, what trains it in PEFT's own comparison (method_comparison/MetaMathQA): adapter_config.json,
training_params.json, and a README.md of what that suite does otherwise. Put it at experiments/lora/NAME there. A method
that stock PEFT cannot hold is refused."""

EXAMPLES = """\
examples:
  python -m harness export RUN_ID --to adapter/
  python -m harness export RUN_ID --to adapter/ --rank 4
  python -m harness export RUN_ID --to peft/method_comparison/MetaMathQA/experiments/lora/mine --as peft-experiment
  lm-eval run --model hf --model_args pretrained=MODEL,peft=adapter/ --tasks gsm8k"""


def add_import(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Give the parser of `import-peft` its options and its text. `path`: reads a path that is given."""
    parser.description, parser.formatter_class = IMPORT, argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=path, metavar="RESULTS_DIR", help="the suite's result files, *.json")
    where = "folder for the tables (default results/reported)"
    parser.add_argument("--to", type=path, default=Path("results/reported"), metavar="DIR", help=where)


def add_export(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Give the parser of `export` its own options and its texts. `path`: as above."""
    parser.description, parser.epilog = EXPORT, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN_ID")
    parser.add_argument("--to", type=path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--rank", metavar="N", help="the adapter cut to this rank, of a run with --rank-curve")
    parser.add_argument("--as", dest="form", default="adapter", metavar="FORM", help="adapter or peft-experiment")
