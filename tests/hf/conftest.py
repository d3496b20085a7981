import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small run several times faster on one thread, above all next to other test workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    transformers.logging.set_verbosity_error()
