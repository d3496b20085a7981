"""compile=True: decode steps of all rows as compiled graphs, on a GPU captured ones, with the tokens of eager steps."""

import gc

import pytest
import torch
from driving import GAPS, Choices, driven, ids_of, near_ties
from gpu import needs_cuda
from tiny_models import new_model
from torch._dynamo.utils import counters

import zigzag_ext as zz
from zigzag_ext.serve.engine import _sizes

PLAN = zz.Plan([("streaming", "retrieval"), "streaming"], sink=4, window=20)
LENGTHS = (30, 5, 70, 17, 44, 9, 21)
NEW = (9, 25, 4, 16, 12, 8, 10)  # rows come and go: the order and number of those that run is another one every few steps


def test_batches_are_powers_of_two_and_all_rows():
    assert [_sizes(rows) for rows in (1, 2, 3, 6, 32)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8, 16, 32)]


def requests_of(driver):
    """Each one step after the other."""
    requests = []
    for length, new in zip(LENGTHS, NEW, strict=True):
        requests.append(driver.submit(ids_of(length), zz.Sampling(new, ignore_eos=True)))
        driver.step()
    return requests


def alone(model, plan, watched) -> list[Choices]:
    """What each request gives in eager steps of its own."""
    with driven(model, plan) as driver:
        samplings = [zz.Sampling(new, ignore_eos=True) for new in NEW]
        return [watched(driver, ids_of(length), each) for length, each in zip(LENGTHS, samplings, strict=True)]


def shapes_of(driver) -> list[list[int]]:
    """The rows of the caches in every decode step to come, -1 for those that are skipped."""
    forward, shapes = driver.slots.forward, []

    def watched(rows, columns, batch=None):
        made = forward(rows, columns, batch)
        if batch is not None:
            shapes.append(made.rows_on(driver.steps.device).tolist())
            assert len(shapes[-1]) == batch
        return made

    driver.slots.forward = watched
    return shapes


def compare(driver, wanted, gap: float, most_ties: int = 1) -> list[list[int]]:
    """Requires the tokens of `alone`, in steps of every size over rows in any order. Returns their rows."""
    shapes, requests = shapes_of(driver), requests_of(driver)
    driver.drain()
    ties = sum(near_ties(each.result(0).token_ids, choices, gap) for each, choices in zip(requests, wanted, strict=True))
    assert ties <= most_ties and [len(each.tokens) for each in requests] == list(NEW)
    assert {len(rows) for rows in shapes} == {1, 2, 4, 5} and any(rows.index(-1) == 3 for rows in shapes if -1 in rows)
    running = [[row for row in rows if row >= 0] for rows in shapes]
    assert any(rows != sorted(rows) for rows in running) and any(max(rows) >= len(rows) for rows in running)
    return shapes


def test_steps_of_every_size_give_the_tokens_of_eager_ones(watched):
    """On a CPU: two compilations, one for a single row and one for all other sizes, both while the engine is made."""
    model = new_model("llama", num_hidden_layers=2)
    wanted = alone(model, PLAN, watched)
    counters.clear()
    with driven(model, PLAN, compile=True, max_rows=5, prefix_cache=True) as driver:
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        assert driver.slots.memory_bytes == 0 and not driver.slots.limits.any()
        with torch.compiler.set_stance("fail_on_recompile"):
            compare(driver, wanted, GAPS["none"])
            again = driver.submit(ids_of(70), zz.Sampling(4, ignore_eos=True))
            driver.finish()
            more = driver.submit(ids_of(70), zz.Sampling(4, ignore_eos=True))
            driver.finish()
            assert more.cached_tokens == 69 and more.result(0).token_ids == again.result(0).token_ids
            driver.drain()


def test_a_model_that_cannot_be_one_graph_is_refused_while_the_engine_is_made():
    model = new_model("llama", num_hidden_layers=2)
    model.model.layers[1].register_forward_hook(lambda module, args, output: print(output.sum().item()))
    with pytest.raises(RuntimeError, match="cannot decode as one compiled graph; give compile=False instead"):
        zz.Engine(model, PLAN, max_len=100, compile=True)
    zz.disable(zz.enable(model))


def on_gpu(**formats):
    """A model, and a plan with layers of each kind."""
    plan = zz.Plan([("streaming", "retrieval"), "streaming", "retrieval", "streaming"], sink=4, window=20, **formats)
    return new_model("llama").to("cuda", torch.bfloat16), plan


def graphs_of(driver) -> list:
    [captured] = driver.steps.session.compiled.steps.values()
    return [step.graph for step in captured.values()]


@needs_cuda
@pytest.mark.parametrize(
    "formats", [{}, {"kv_format": "int8", "ring_kv_format": "int8", "key_smoothing": True}], ids=["plain", "int8"]
)
def test_a_step_of_all_rows_is_one_replay(formats, watched, monkeypatch):
    """Captured while the engine is made, all graphs in one pool of memory."""
    model, plan = on_gpu(**formats)
    wanted, replays, replay = alone(model, plan, watched), [], torch.cuda.CUDAGraph.replay
    with driven(model, plan, compile=True, max_rows=5) as driver:
        graphs = graphs_of(driver)
        assert len(graphs) == 4 and None not in graphs and len({graph.pool() for graph in graphs}) == 1
        assert driver.slots.memory_bytes == 0 and not driver.slots.limits.any()
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
        with torch.compiler.set_stance("fail_on_recompile"):
            shapes = compare(driver, wanted, 0.25, most_ties=3)
        assert len(replays) == len(shapes) and {id(graph) for graph in replays} == {id(graph) for graph in graphs}
        assert graphs_of(driver) == graphs


@needs_cuda
def test_weights_that_are_exchanged_are_captured_again(watched):
    model, plan = on_gpu()
    other = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    before, model.lm_head.weight = model.lm_head.weight, other
    wanted = alone(model, plan, watched)
    model.lm_head.weight = before
    with driven(model, plan, compile=True, max_rows=5) as driver:
        driver.submit(ids_of(30), zz.Sampling(4, ignore_eos=True))
        driver.drain()
        graphs = graphs_of(driver)
        model.lm_head.weight = other
        compare(driver, wanted, 0.25, most_ties=3)
        assert not {id(graph) for graph in graphs} & {id(graph) for graph in graphs_of(driver)}


@needs_cuda
def test_an_engine_that_is_closed_leaves_no_graphs():
    model, plan = on_gpu()
    ids, sizes = ids_of(30), []
    for _ in range(3):
        with zz.Engine(model, plan, max_len=400, max_rows=4, memory=1 << 28) as engine:  # compiled where nothing is said
            assert [len(each.token_ids) for each in engine.generate([ids] * 6, zz.Sampling(8, ignore_eos=True))] == [8] * 6
            assert engine.stats()["cached_tokens"] > 0
        del engine
        gc.collect()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert abs(sizes[2] - sizes[1]) < 1 << 20  # the workspace of one cache is larger; the first engine leaves what libraries keep
