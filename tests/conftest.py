"""Fixtures for every test."""

from pathlib import Path

import pytest

import ptq.outcome

PEERS = Path(__file__).parents[1] / ".venv-peers"


def pytest_addoption(parser):
    """`--llama-cpp`: the source tree of llama.cpp, whose converter the peers' tests run."""
    parser.addoption("--llama-cpp", metavar="FOLDER", default=PEERS / "llama.cpp", help="llama.cpp's source tree")


@pytest.fixture(autouse=True, scope="module")
def pages(request):
    """Runs in this process draw no report page, which takes longer than a tiny model, unless the module sets PAGES."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "PAGES", False):
            patch.setattr(ptq.outcome, "write_page", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with trained models, texts and tokenizers beside the checkout, where there is one."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder
