import collections

import pytest
import torch
from op_cases import DTYPES


def pytest_generate_tests(metafunc):
    """`device` and `dtype` arguments run over what the machine has: float32 only on the CPU."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    if {"device", "dtype"} <= set(metafunc.fixturenames):
        pairs = [pytest.param(d, t, id=f"{d}-{str(t)[6:]}") for d in devices for t in DTYPES[d]]
        metafunc.parametrize("device,dtype", pairs)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices)


@pytest.fixture(scope="module")
def demo_model():
    """The demo's model and tokenizer. Without the package that carries them a test is skipped, but never in CI: .ci/checks.py."""
    from zigzag_ext.cli import demo

    try:
        return demo.load(device="cpu")
    except FileNotFoundError as error:
        if demo.FETCH_COMMAND not in str(error):
            raise
        pytest.skip(str(error))


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
