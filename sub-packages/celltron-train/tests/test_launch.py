import pytest
import torch

from celltron.core import InputError
from celltron.train.launch import Launch, choose_device, read_launch, start_process_group


def test_without_a_launcher_a_process_is_alone() -> None:
    launch = read_launch({"HOME": "/"})
    assert launch == Launch(rank=0, world_size=1, local_rank=0)
    assert launch.is_main


def test_what_torchrun_sets_is_read() -> None:
    launch = read_launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert launch == Launch(rank=5, world_size=8, local_rank=1)
    assert not launch.is_main


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_run_that_is_started_again_is_known(name: str) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for others in ({}, place):
        assert not read_launch(others).is_restart
        assert not read_launch(others | {name: "0"}).is_restart
        assert read_launch(others | {name: "2"}).is_restart


def test_a_part_of_it_is_refused_and_what_is_missing_named() -> None:
    with pytest.raises(InputError, match="sets RANK, WORLD_SIZE but not LOCAL_RANK"):
        read_launch({"RANK": "0", "WORLD_SIZE": "2"})


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(InputError, match="'0', 'two', '0'"):
        read_launch({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"})


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    assert choose_device("auto", Launch()) == choose_device("cpu", Launch()) == torch.device("cpu")
    see_gpus(monkeypatch, 4)
    assert choose_device("cpu", Launch()) == torch.device("cpu")
    for device in ("auto", "cuda"):
        assert choose_device(device, Launch(rank=7, world_size=8, local_rank=3)) == torch.device("cuda", 3)


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    with pytest.raises(InputError, match="device is cuda, but PyTorch .* sees no GPU"):
        choose_device("cuda", Launch())
    see_gpus(monkeypatch, 2)
    with pytest.raises(InputError, match="process 2 of this machine has no GPU, PyTorch sees 2"):
        choose_device("auto", Launch(rank=2, world_size=3, local_rank=2))


def test_a_process_alone_starts_a_group_without_a_port(engine: None) -> None:
    start_process_group(Launch(), torch.device("cpu"))
    assert torch.distributed.get_world_size() == 1
    assert torch.distributed.get_backend() == "gloo"
    numbers = torch.ones(2)
    torch.distributed.all_reduce(numbers)
    assert numbers.tolist() == [1.0, 1.0]
