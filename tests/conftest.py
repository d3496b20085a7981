import collections
import tempfile
from pathlib import Path

import filelock
import pages
import pytest
import torch
from hypothesis import settings
from op_cases import DTYPES

settings.register_profile("machine", deadline=None)  # how long an example takes is up to the machine and what else runs on it
settings.load_profile("machine")


def pytest_generate_tests(metafunc):
    """`device` and `dtype` arguments run over what the machine has: float32 only on the CPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    if {"device", "dtype"} <= set(metafunc.fixturenames):
        pairs = [pytest.param(d, t, id=f"{d}-{str(t)[6:]}") for d in devices for t in DTYPES[d]]
        metafunc.parametrize("device,dtype", pairs)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices)


@pytest.fixture(scope="session")
def demo_folder():
    """The demo's model. Without the package that carries it a test is skipped, but never in CI: .ci/checks.py."""
    from zigzag_ext.cli import demo

    try:
        return demo.model_folder()
    except FileNotFoundError as error:
        if demo.FETCH_COMMAND not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def demo_model(demo_folder):
    """The demo's model and tokenizer."""
    from zigzag_ext.cli import demo

    return demo.load(device="cpu")


@pytest.fixture
def demo_place(demo_folder, tmp_path, monkeypatch):
    """Makes `tmp_path` the present folder, where the demo's model has its name on the hub; the environment of commands there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return pages.prepare(tmp_path, demo_folder)


@pytest.fixture
def gpu_memory():
    """One test at a time, of all processes, takes much of a GPU's memory or measures how much is free."""
    with filelock.FileLock(Path(tempfile.gettempdir()) / "zigzag_ext_gpu_memory.lock"):
        yield


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="every place instead of some, in tests that go through many")


def pytest_terminal_summary(terminalreporter):
    """Sums of what tests have recorded as `record_property("count of ...", number)`, whichever process ran them."""
    counts = collections.Counter()
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        if report.when == "call":
            counts.update({name: number for name, number in report.user_properties if name.startswith("count of ")})
    for name, number in counts.items():
        terminalreporter.write_line(f"{name.removeprefix('count of ')}: {number:,}")
