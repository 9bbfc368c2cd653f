import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import pytest
import torch

from docs.make.chromium import find_chromium
from tests import annotations
from tests.accelerator import DEVICE, lenient

STRICT = bool(os.environ.get("TL_CIRCUITS_REQUIRE_ALL"))


def need(present: bool, what: str) -> None:
    """Skip the test when something optional is missing; fail where everything must be there."""
    if not present:
        (pytest.fail if STRICT else pytest.skip)(f"needs {what}")


def pytest_configure():
    annotations.install()


def pytest_collection_modifyitems(items):
    """Tests of real models first: one of two processes opens those models, and the longest tests are not the last."""
    items.sort(key=lambda item: not opens_a_real_model(item))


def opens_a_real_model(item):
    names = {*item.fixturenames}
    if "request" in names and hasattr(item, "callspec"):  # the model is asked for by a parameter
        names |= {str(value) for value in item.callspec.params.values()}
    return bool(names & {"smollm2", "smollm2-135m", "gemma3", "gemma-3-270m"})


@pytest.fixture(scope="session", autouse=True)
def _devices_of_tests():
    with lenient():
        yield


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))


@pytest.fixture(scope="session")
def chromium():
    """The path of an installed Chromium."""
    found = find_chromium()
    need(found is not None, "Chromium (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="session")
def browser(chromium):
    """One headless Chromium for the session."""
    from tests.browser import FLAGS

    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


def _packaged(name):
    import tl_circuits as tlc
    from tl_circuits.models import PACKAGED

    model = PACKAGED[name]
    need(model.installed or model.folder.is_dir(), model.command)
    return tlc.load_model(name, device=DEVICE)


@pytest.fixture(scope="session")
def smollm2():
    return _packaged("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3():
    return _packaged("gemma-3-270m")
