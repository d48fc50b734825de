"""The configuration of the dEBORA adapter as PEFT stores it."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

PEFT_TYPE = "DEBORA"  # a plain string: PEFT's own enumeration of methods is closed


@dataclass
class DeboraConfig(PeftConfig):
    """Shapes of the adapter Psi = U diag(s) V^T, and what s starts from.

    The final ranks live here, in `rank_pattern`, so that a saved adapter is built again at its own shapes. Raises
    ValueError for a number out of range.
    """

    r: int = field(default=8, metadata={"help": "rank of every layer that rank_pattern does not name (>= 1)"})
    tau: float = field(default=16.0, metadata={"help": "bound on the sum of s - eps over a layer (> 0)"})
    eps: float = field(default=1e-3, metadata={"help": "least value of an entry of s (> 0)"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "ends of the names of the linear layers to adapt, or a regular expression"}
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
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} should be above 0")
        if any(rank < 0 for rank in self.rank_pattern.values()):
            raise ValueError(f"rank_pattern = {self.rank_pattern} should hold no negative rank")
