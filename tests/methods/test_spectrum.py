"""Singular values of kept adapters: as their methods read them, whoever wrote the adapter."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import installed
from harness.contracts.subject import Subject, start
from methods.shared.spectrum import spectrum


@pytest.mark.parametrize("method", ["lora[rank=2]", "adalora", "debora", "pruned_lora", "peft[type=lora,r=2]"])
def test_a_method_reads_what_it_exports(tmp_path, method):
    started = start(Subject(method, tmp_path))
    started.training.run(lambda training: None)
    started.adaptation.export(tmp_path / "adapter")
    found = installed.singular_values(method.partition("[")[0], tmp_path / "adapter")
    ranks = {layer: rank for layer, rank in started.adaptation.ranks().items() if rank}
    assert {layer: len(values) for layer, values in found.items()} == ranks
    assert all((np.diff(values) <= 0).all() and values[0] > 0 for values in found.values())


def test_others_have_none(tmp_path):
    assert installed.singular_values("full", tmp_path) == {}
    assert installed.singular_values("not_installed", tmp_path) == {}


def test_spectrum_is_that_of_the_scaled_product(tmp_path):
    random = np.random.default_rng(0)
    B, A = random.standard_normal((7, 3)), random.standard_normal((3, 5))
    prefix = "base_model.model.encoder.query"
    save_file({f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 1, "alpha_pattern": {"query": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = spectrum(tmp_path)
    expected = np.linalg.svd(2 * B @ A, compute_uv=False)[:3]
    assert found["encoder.query"] == pytest.approx(expected)
    assert spectrum(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"A": np.full((3, 5), np.nan)}, {}),
        ({"B": np.full((7, 3), np.inf)}, {}),
        ({"B": np.full((7, 3), 1e300), "A": np.full((3, 5), 1e300)}, {}),
        ({"B": np.ones((7, 4))}, {}),
        ({"B": np.ones(7)}, {}),
        ({"A": np.ones(())}, {}),
        ({"A": np.ones((0, 5)), "B": np.ones((7, 0))}, {}),
        ({"A": np.ones((3, 5), dtype=np.int32)}, {}),
        ({"B": None}, {}),
        ({}, {"lora_alpha": "16"}),
        ({}, {"lora_alpha": None}),
        ({}, {"lora_alpha": True}),
        ({}, {"lora_alpha": -4}),
        ({}, {"lora_alpha": float("nan")}),
        ({}, {"lora_alpha": 10**400}),
        ({}, {"alpha_pattern": {"(query": 6}}),
        ({}, {"alpha_pattern": {"query": "6"}}),
        ({}, {"use_rslora": "no"}),
        ({}, [1]),
        ({}, "[" * 100_000),
        ({}, "{"),
        ("no tensors", {}),
    ],
)
def test_a_garbled_adapter_has_no_spectrum(tmp_path, tensors, config):
    whole = {"A": np.ones((3, 5)), "B": np.ones((7, 3))}
    weights = tmp_path / "adapter_model.safetensors"
    if isinstance(tensors, str):
        weights.write_text(tensors)
    else:
        kept = {name: value for name, value in (whole | tensors).items() if value is not None}
        save_file({f"base_model.model.query.lora_{name}.weight": value for name, value in kept.items()}, weights)
    told = {"lora_alpha": 4} | config if isinstance(config, dict) else config
    (tmp_path / "adapter_config.json").write_text(told if isinstance(told, str) else json.dumps(told))
    assert spectrum(tmp_path) == {}
