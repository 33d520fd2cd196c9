from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from celltron.core import InputError
from celltron.train.meeting import open_fresh_part


@pytest.fixture
def store() -> torch.distributed.Store:
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet(store: torch.distributed.Store, world_size: int) -> list[torch.distributed.Store]:
    clients = [store.clone() for _ in range(world_size)]
    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(open_fresh_part, clients[rank], rank, world_size, 10.0) for rank in range(world_size)]
        return [future.result() for future in futures]


def test_each_start_has_a_part_of_its_own(store: torch.distributed.Store) -> None:
    store.set("hello/1", "of one that died before the main process came")
    for start in ("first", "second"):
        parts = meet(store, 3)
        assert not any(part.check(["address"]) for part in parts)
        parts[2].set("address", start)
        assert [part.get("address").decode() for part in parts] == [start] * 3


def test_a_main_process_that_died_halfway_is_not_followed(store: torch.distributed.Store) -> None:
    with pytest.raises(InputError, match="process 1 of this run did not come to meet the others within 0 s"):
        open_fresh_part(store, 0, 2, 0.0)
    parts = meet(store, 2)
    parts[0].set("address", "new")
    assert parts[1].get("address") == b"new"


def test_a_process_alone_waits_for_nobody(store: torch.distributed.Store) -> None:
    assert open_fresh_part(store, 0, 1, 0.0).num_keys() >= 0
