"""Every collective is counted with the bytes that it has, without other processes: nothing is sent by a fake group."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from celltron.train.count_bytes import CountBytes, Traffic, ring_bytes

WORLD = "default_pg"


@pytest.fixture
def groups() -> Iterator[dict[str, distributed.ProcessGroup]]:
    """Four processes, and of them a pair and one alone."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    pair = distributed.new_group([0, 1], group_desc="PAIR")
    alone = distributed.new_group([0], group_desc="ALONE")
    yield {"pair": pair, "alone": alone}
    distributed.destroy_process_group()


def parts(count: int, size: int) -> list[torch.Tensor]:
    return [torch.zeros(size) for _ in range(count)]


# What is called; its kind; bytes of the whole float32 tensor; what each of 4 processes sends of it.
CALLS: dict[str, tuple[Callable[[], object], str, int, float]] = {
    "all_reduce": (lambda: distributed.all_reduce(torch.zeros(8)), "all_reduce", 32, 48),
    "all_reduce, half": (
        lambda: distributed.all_reduce(torch.zeros(8, dtype=torch.bfloat16)),
        "all_reduce",
        16,
        24,
    ),
    "all_gather": (lambda: distributed.all_gather(parts(4, 2), torch.zeros(2)), "all_gather", 32, 24),
    "all_gather_into_tensor": (
        lambda: distributed.all_gather_into_tensor(torch.zeros(8), torch.zeros(2)),
        "all_gather",
        32,
        24,
    ),
    "reduce_scatter": (lambda: distributed.reduce_scatter(torch.zeros(2), parts(4, 2)), "reduce_scatter", 32, 24),
    "reduce_scatter_tensor": (
        lambda: distributed.reduce_scatter_tensor(torch.zeros(2), torch.zeros(8)),
        "reduce_scatter",
        32,
        24,
    ),
    "all_to_all": (lambda: distributed.all_to_all_single(torch.zeros(8), torch.zeros(8)), "all_to_all", 32, 24),
    "broadcast": (lambda: distributed.broadcast(torch.zeros(8), 0), "broadcast", 32, 24),
    "reduce": (lambda: distributed.reduce(torch.zeros(8), 0), "reduce", 32, 24),
    # 3 of 4 send their 8 bytes to the root, or the root sends 3 of 4 parts.
    "gather": (lambda: distributed.gather(torch.zeros(2), parts(4, 2), dst=0), "gather", 32, 6),
    "scatter": (lambda: distributed.scatter(torch.zeros(2), parts(4, 2), src=0), "scatter", 32, 6),
    "send": (lambda: distributed.send(torch.zeros(8), 1), "send", 32, 32),
    "recv": (lambda: distributed.recv(torch.zeros(8), 1), "recv", 32, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_counted(groups: dict[str, distributed.ProcessGroup], name: str) -> None:
    call, kind, tensor_bytes, sent_bytes = CALLS[name]
    with CountBytes() as counted:
        call()
    assert counted.traffic == {(kind, WORLD): Traffic(1, tensor_bytes, sent_bytes)}
    assert ring_bytes(kind, 4, tensor_bytes) == sent_bytes


def test_several_at_once_are_counted(groups: dict[str, distributed.ProcessGroup]) -> None:
    with CountBytes() as counted:
        exchange = [
            distributed.P2POp(distributed.isend, torch.zeros(3), 1),
            distributed.P2POp(distributed.irecv, torch.zeros(5), 1),
        ]
        for work in distributed.batch_isend_irecv(exchange):
            work.wait()
        with distributed._coalescing_manager(async_ops=True) as manager:
            for _ in range(2):
                distributed.reduce_scatter_tensor(torch.zeros(2), torch.zeros(8))
        manager.wait()
    assert counted.traffic[("send", WORLD)] == Traffic(1, 12, 12)
    assert counted.traffic[("recv", WORLD)] == Traffic(1, 20, 0)
    assert counted.total("reduce_scatter").tensor_bytes == 64 and counted.total("reduce_scatter").sent_bytes == 48


def test_groups_are_told_apart_and_one_process_alone_sends_nothing(
    groups: dict[str, distributed.ProcessGroup],
) -> None:
    with CountBytes() as counted:
        for _ in range(3):
            distributed.all_reduce(torch.zeros(8), group=groups["pair"])
        distributed.all_reduce(torch.zeros(8), group=groups["alone"])
        distributed.barrier()
        distributed.broadcast(torch.zeros(8), 0)
    assert counted.traffic == {("all_reduce", "PAIR"): Traffic(3, 96, 96), ("broadcast", WORLD): Traffic(1, 32, 24)}
    assert counted.total() == Traffic(4, 128, 120) and counted.total("broadcast") == Traffic(1, 32, 24)
    assert counted.total("send") == Traffic()


class Reduced(torch.autograd.Function):
    """As Megatron's mappings: the gradient is summed in the backward pass."""

    @staticmethod
    def forward(context: object, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def test_backward_passes_and_names_bound_before_are_seen(groups: dict[str, distributed.ProcessGroup]) -> None:
    from megatron.core.tensor_parallel import mappings

    values = torch.zeros(4, requires_grad=True)
    with CountBytes() as counted:
        Reduced.apply(values).sum().backward()
        mappings.dist_all_gather_func(torch.zeros(8), torch.zeros(2))
    assert counted.traffic == {
        ("all_reduce", WORLD): Traffic(1, 16, 24),
        ("all_gather", WORLD): Traffic(1, 32, 24),
    }
    distributed.all_reduce(torch.zeros(4))
    assert counted.total("all_reduce").calls == 1, "the context is closed"


def test_what_cannot_be_counted_is_not_passed_over(groups: dict[str, distributed.ProcessGroup]) -> None:
    from torch.distributed import _functional_collectives as functional

    with CountBytes(), pytest.raises(NotImplementedError, match="_c10d_functional::all_reduce"):
        functional.all_reduce(torch.zeros(4), "sum", distributed.group.WORLD)
