"""The initial values of PEFT's LoRA that keep the model's function, by their names."""

from __future__ import annotations

import re

from harness.errors import unknown

MOST_ITERATIONS = 1000  # of PiSSA's fast SVD
INITS = ("default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16")


def known_init(init: str) -> str:
    """The name, if it is one. Raises ValueError and InputError for any other."""
    number = re.fullmatch(r"pissa_niter_(-?[0-9]+)", init)
    if number and not (len(number[1]) < 9 and 1 <= int(number[1]) <= MOST_ITERATIONS):
        raise ValueError(f"'{init}' is not allowed: N of pissa_niter_N is 1 to {MOST_ITERATIONS}")
    if init not in INITS and not number:
        raise unknown("init", init, INITS)
    return init
