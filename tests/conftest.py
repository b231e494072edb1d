"""What every test shares: no network, one torch thread, and the recorded data beside the repository."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

assert "torch" not in sys.modules, "torch reads these at its import"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # xdist fills the cores; and the same count in every process, bit for bit
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns when it has threads and a test forks

ROOT = Path(__file__).resolve().parent.parent


def beside(name: str) -> Path:
    """A folder beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / name
    if not folder.is_dir():
        pytest.skip(f"needs ../{name} beside the repository, which is absent")
    return folder


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a run leaves in the environment, such as the port where its ranks meet, reaches no other test."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name not in before and not name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if not name.startswith("PYTEST_")})


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared: real rows, recorded runs, references."""
    return beside("shared")


@pytest.fixture(scope="session")
def parity() -> Path:
    """The folder ../shared/parity: runs recorded from LlamaFactory, with their model and rows."""
    return beside("shared/parity")
