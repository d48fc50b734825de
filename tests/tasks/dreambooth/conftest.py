"""A tiny Stable Diffusion pipeline with random weights, and pictures, written once."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def script():
    path = Path(__file__).parents[3] / "scripts" / "make_tiny_diffusion.py"
    specification = importlib.util.spec_from_file_location("make_tiny_diffusion", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def place(script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_diffusion")
    script.write(folder, updates=4)
    return folder


@pytest.fixture(scope="session")
def subject(place) -> Path:
    return place / "subject"


@pytest.fixture(scope="session")
def model(place) -> str:
    return str(place / "pipeline")
