"""The configuration of the dEBORA adapter as PEFT stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft import PeftConfig

PEFT_TYPE = "DEBORA"  # a plain string: PEFT's own enumeration of methods is closed
GEOMETRIES = ("matrix", "oblique", "stiefel")
STARTS = ("interior", "vertex")


@dataclass
class DeboraConfig(PeftConfig):
    """Shapes of the adapter Psi = sum_i s_i u_i^(1) (x) ... (x) u_i^(d), where its factors live, and where s starts.

    The final ranks live here, in `rank_pattern`, so that a saved adapter is built again at its own shapes; s itself is
    saved with the factors, so tau, eps and start only matter to a new adapter. Raises ValueError for a value out of
    range.
    """

    r: int = field(default=8, metadata={"help": "rank of every layer that rank_pattern does not name (>= 1)"})
    tau: float = field(default=16.0, metadata={"help": "bound on the sum of s - eps over a layer (> 0)"})
    eps: float = field(default=1e-3, metadata={"help": "least value of an entry of s (> 0)"})
    geometry: str = field(
        default="matrix",
        metadata={
            "help": "the factors' columns: free (matrix), of norm 1 (oblique), or orthonormal (stiefel; the spatial "
            "factors of a convolution are then oblique)"
        },
    )
    start: str = field(
        default="interior", metadata={"help": "s of a new adapter: tau shared out evenly (interior), or eps (vertex)"}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "ends of the names of the layers to adapt, or a regular expression"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules that are trained and saved whole: the task's head"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "rank (>= 0) by the layer's exact qualified name in the base model"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        for name in ("r", "tau", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} should be above 0 and finite")
        for name, known in (("geometry", GEOMETRIES), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = '{getattr(self, name)}' should be one of {', '.join(known)}")
        if any(rank < 0 for rank in self.rank_pattern.values()):
            raise ValueError(f"rank_pattern = {self.rank_pattern} should hold no negative rank")
        self._check_start()

    def _check_start(self) -> None:
        """Refuse an interior start that would change the model's function; see `initial_factors`."""
        if self.start == "vertex" or self.geometry == "matrix":
            return
        if self.geometry == "stiefel":
            raise ValueError("start = 'interior' changes the model where geometry = 'stiefel': set start = 'vertex'")
        if self.r % 2:
            raise ValueError(
                f"r = {self.r} should be even where geometry = 'oblique' and start = 'interior': components cancel in "
                "pairs"
            )
