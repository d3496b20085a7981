"""Tensor parallelism inside one process: a process group of one rank."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from zigzag_ext.hf.compiled import fingerprint
from zigzag_ext.serve.prefixes import model_state


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shared_out(mesh, placement):
    model = nn.Linear(4, 4)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))
    return model


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["shard", "replicate"])
def test_the_fingerprint_notices_moved_weights_that_are_shared_out(mesh, placement):
    model = shared_out(mesh, placement)
    assert model.weight.data_ptr() == 0, "a DTensor has an address: look at the local part no more"
    held, before = model.weight, fingerprint(model)  # held, so that its memory is not used again
    assert fingerprint(model) == before
    model.weight = nn.Parameter(distribute_tensor(held.full_tensor().detach().clone(), mesh, [placement]))
    assert fingerprint(model) != before


@pytest.mark.parametrize("local", [False, True], ids=["whole", "local"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_prefixes_notice_writes_to_weights_that_are_shared_out(mesh, local, grad):
    """In the DTensor or in its local part, whether gradients are recorded or not when it is looked at."""
    model = shared_out(mesh, Shard(0))
    with torch.set_grad_enabled(grad):
        before = model_state(model)
        assert model_state(model) == before
        with torch.no_grad():
            (model.weight.to_local() if local else model.weight).mul_(2)
        assert model_state(model) != before
