"""The names that PEFT gives to an adapter and its tensors."""

from __future__ import annotations

PREFIX = "base_model.model."  # what PEFT puts before the backbone's own names


ADAPTER = "default"  # PEFT's name for a model's first adapter
