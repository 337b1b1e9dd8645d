"""What travels, when, and how much memory it takes: counted collectives, bytes, order of events, peak."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.memory import transient_bytes
from normuon_plugins import NorMuon, plan_exchange
from normuon_plugins.core import adamw_step
from tests.distributed import cases
from tests.ranks import run_ranks

SIDE = 32
# Transient bytes by bucket_bytes. Multiplying takes at most 5 of them, messages under way the rest: 7.3 in all.
STATED_MULTIPLE = 8

SMALL_STATE = {"momentum_dtype": "int8", "nesterov": True}


def square_model(count, mesh=None, side=SIDE):
    """Return ``count`` equal matrices with gradients, sharded by rows where there is a mesh."""
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(side, side)) for _ in range(count)])
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        parameter.grad = cases.place_like(torch.randn(side, side), parameter)
    return model


class Recorder:
    """Note every all-to-all and every batch of multiplications, in order."""

    def __init__(self, monkeypatch):
        self.events = []
        self.sent = self.received = 0
        original = dist.all_to_all_single

        def all_to_all_single(output, input, output_sizes, input_sizes, **options):
            rank = dist.get_rank()
            self.sent += sum(size for place, size in enumerate(input_sizes) if place != rank)
            self.received += sum(size for place, size in enumerate(output_sizes) if place != rank)
            self.events.append("message")
            return original(output, input, output_sizes, input_sizes, **options)

        monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)

    def orthogonalize(self, matrices):
        self.events.append(len(matrices))
        return matrices.clone()


def collectives(model, **options):
    """Return the number of each collective in the second step, and whether weights moved."""
    optimizer = cases.optimizer_of(model.named_parameters(), **options)
    cases.steps(model, optimizer, 0, 1)
    before = {name: cases.gathered(parameter) for name, parameter in model.named_parameters()}
    with CommDebugMode() as mode:
        cases.steps(model, optimizer, 1, 2)
    moved = all(not torch.equal(cases.gathered(p), before[name]) for name, p in model.named_parameters())
    return {str(name): count for name, count in mode.get_comm_counts().items()}, moved


def only(model, *names):
    """Keep some parameters of a dict."""
    return nn.ParameterDict({name: model[name] for name in names})


def count_messages():
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    found = {"fsdp": collectives(cases.fsdp(line)())}
    rows = cases.dtensors(line, lambda shape: [Shard(0)])
    found["experts on their dimension"] = collectives(only(rows(), "experts", "experts_do_not_divide", "bias"))
    found["adamw alone"] = collectives(only(rows(), "bias", "embedding"))
    found["whole on one rank"] = collectives(only(rows(), "one_row", "embedding"))
    replicated = cases.dtensors(line, lambda shape: [Replicate()])
    found["replicas"] = collectives(replicated())
    found["redundant replicas"] = collectives(replicated(), replicas="redundant")
    found["plain"] = collectives(cases.plain())
    found["plain, shared"] = collectives(cases.plain(), process_group=dist.group.WORLD)
    return found


def test_two_collectives_per_bucket_and_none_where_none_is_needed():
    for found in run_ranks(count_messages, 4):
        assert all(moved for _, moved in found.values())
        assert {name: counts for name, (counts, _) in found.items()} == {
            "fsdp": {"c10d.alltoall_base_": 2},
            "experts on their dimension": {},
            "adamw alone": {},
            "whole on one rank": {},
            "replicas": {"c10d.alltoall_base_": 1},  # nothing to gather
            "redundant replicas": {},
            "plain": {},
            "plain, shared": {"c10d.alltoall_base_": 1},
        }


def measure_traffic():
    """Return what was sent and received, the matrices multiplied, and the report's numbers, per rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        line, square = (world,), (2, world // 2)
        fixed, matched = {"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "match_progress_adamw"}
        small_buckets = {**fixed, "bucket_bytes": 2 * SIDE**2 * 2}
        runs = ((line, fixed), (line, small_buckets), (square, fixed), (line, matched), (square, matched))
        for mesh_shape, options in runs:
            names = ("replicate", "shard")[-len(mesh_shape) :]
            model = square_model(13, init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
            recorder = Recorder(monkeypatch)
            optimizer = NorMuon(
                model.parameters(), ns_dtype="bfloat16", orthogonalize_fn=recorder.orthogonalize, **options
            )
            optimizer.step()
            replicas = mesh_shape[0] if len(mesh_shape) == 2 else 1
            report = plan_exchange([((SIDE, SIDE), "o i")] * 13, shards=world // replicas, replicas=replicas, **options)
            found.append(
                {
                    "sent": (recorder.sent, report.bytes_sent[rank]),
                    "received": (recorder.received, report.bytes_received[rank]),
                    "messages": (recorder.events.count("message"), report.collectives),
                    "matrices": sum(event for event in recorder.events if event != "message"),
                }
            )
    return found


def test_traffic_is_what_the_report_says_and_no_matrix_is_multiplied_twice():
    """The shard once out and once back in bfloat16, with neuron state and notes, in steps of 16 bytes."""
    ranks = run_ranks(measure_traffic, 4)
    for runs in zip(*ranks, strict=True):
        assert sum(run["matrices"] for run in runs) == 13
        for run in runs:
            for direction in ("sent", "received"):
                seen, reported = run[direction]
                assert reported <= seen <= 1.02 * reported + 200
            assert run["messages"][0] == run["messages"][1]
    in_one_round, in_many, *_ = ranks[0]
    assert in_one_round["messages"][0] == 2
    assert in_many["messages"][0] > 2
    shard = 13 * SIDE * SIDE * 2 // 4
    assert in_one_round["sent"][1] < 2.1 * shard


def record_order():
    with pytest.MonkeyPatch.context() as monkeypatch:
        model = square_model(8, init_device_mesh("cpu", (2,)))
        recorder = Recorder(monkeypatch)
        optimizer = NorMuon(
            [
                {"params": list(model.parameters())[:-1]},
                {"params": list(model.parameters())[-1:], "algorithm": "adamw"},
            ],
            bucket_bytes=SIDE**2 * 2,
            ns_dtype="bfloat16",
            orthogonalize_fn=recorder.orthogonalize,
        )
        monkeypatch.setattr(adamw_step, "adamw", lambda *_, **__: recorder.events.append("adamw"))
        optimizer.step()
        return recorder.events


def test_the_next_round_is_in_flight_while_one_is_multiplied_and_adamw_runs_in_the_gap():
    first, second = run_ranks(record_order, 2)
    out = back = "message"
    assert first == [out, "adamw", out, 1, back, out, 1, back, out, 1, back, 1, back]
    # The second rank owns three of seven matrices: nothing to multiply in the last round, the same messages.
    assert second == [out, "adamw", out, 1, back, out, 1, back, out, 1, back, back]


def measure_memory(shard):
    """Return the transient bytes of a step, for models of two sizes and three sets of options, at one bucket size."""
    found = []
    bucket_bytes = 4 * 128**2 * 4
    for count in (24, 96):
        for ns_dtype, more in (("float32", {}), ("bfloat16", {}), ("bfloat16", SMALL_STATE)):
            mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if shard else None
            group = None if shard or dist.get_world_size() == 1 else dist.group.WORLD
            model = square_model(count, mesh, side=128)
            assert all(isinstance(parameter, DTensor) is shard for parameter in model.parameters())
            options = {"bucket_bytes": bucket_bytes, "ns_dtype": ns_dtype, "process_group": group, **more}
            optimizer = NorMuon(model.parameters(), **options)
            optimizer.step()
            found.append(transient_bytes(optimizer.step, torch.device("cpu")) / bucket_bytes)
    return found


@pytest.mark.parametrize(("world_size", "shard"), [(1, False), (2, True), (4, True), (4, False)])
def test_transient_memory_is_a_small_multiple_of_the_bucket_whatever_the_model(world_size, shard):
    for found in run_ranks(measure_memory, world_size, shard):
        assert max(found) <= STATED_MULTIPLE
