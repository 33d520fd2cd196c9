"""Each change that cpu.py lists, one test."""

import ast
import logging
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import torch_fully_sharded_data_parallel as megatron_fsdp
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel import random as megatron_random

from celltron.train import cpu

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("engine")


def test_the_current_device_is_the_cpu() -> None:
    assert torch.cuda.current_device() == CPU
    assert torch.zeros(2, device=torch.cuda.current_device()).device == CPU


def test_there_is_nothing_to_wait_for_or_to_empty() -> None:
    assert torch.cuda.synchronize() is None
    assert torch.cuda.synchronize(CPU) is None
    assert torch.cuda.empty_cache() is None


def test_a_mesh_of_a_group_is_one_of_cpus() -> None:
    mesh = megatron_fsdp.DeviceMesh.from_group(torch.distributed.group.WORLD, "cuda")
    assert mesh.device_type == "cpu" and mesh.size() == 1


def test_the_generator_is_that_of_the_cpu() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.default_generator.manual_seed(5)
    assert torch.equal(torch.default_generator.get_state(), state)
    assert torch.equal(torch.rand(3), drawn)


def test_a_forked_state_draws_from_the_cpu_and_gives_the_generator_back(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(5)
    outside = torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(2)
    with caplog.at_level(logging.WARNING), get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    assert torch.equal(torch.cat([first, torch.rand(2)]), outside)
    assert not torch.equal(inside, outside)
    assert caplog.text == ""
    assert megatron_random._get_cuda_rng_state().equal(torch.default_generator.get_state())


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda", 1)])
def test_tensors_asked_for_on_cuda_are_made_on_the_cpu(device: str | torch.device) -> None:
    made = [
        torch.tensor([1.0], device=device),
        torch.zeros(1, device=device),
        torch.empty(1, device=device),
        torch.arange(1, device=device),
        torch.ones(1).to(device=device),
        torch.empty_like(torch.ones(1), device=device),
    ]
    assert {tensor.device for tensor in made} == {CPU}


def test_moving_to_cuda_is_the_identity() -> None:
    tensor = torch.ones(1)
    assert tensor.cuda() is tensor


def test_types_have_the_names_that_megatron_compares_with() -> None:
    names = {dtype: torch.ones(1, dtype=dtype).type() for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    assert names == {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float64: "torch.cuda.FloatTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
    }
    assert torch.ones(1).type(torch.float64).dtype is torch.float64


def test_float_leaves_float64_alone() -> None:
    tensor = torch.ones(1, dtype=torch.float64)
    assert tensor.float() is tensor
    assert torch.ones(1, dtype=torch.bfloat16).float().dtype is torch.float32


def test_installing_again_changes_nothing() -> None:
    before = torch.cuda.current_device
    cpu.install()
    assert torch.cuda.current_device is before
    assert len(cpu._installed) == 1


def test_another_megatron_is_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_installed", [])
    monkeypatch.setattr(cpu, "megatron_version", "9.9.0")
    before = torch.cuda.current_device
    with pytest.raises(ImportError, match=r"megatron-core 9\.9\.0 is installed.*install megatron-core==0\.16\.1"):
        cpu.install()
    assert torch.cuda.current_device is before


def test_only_a_run_on_a_cpu_imports_it() -> None:
    importers = []
    for path in sorted(Path(cpu.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("celltron.train", "celltron.train.cpu"):
                importers.append((path.name, node in tree.body))
    # In a function, for a CPU device; see test_launch.py.
    assert importers == [("launch.py", False)]


def test_products_of_bfloat16_are_made_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 64, 64, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    bias = torch.randn(64, generator=generator).bfloat16()
    with cpu._CudaMeansCpu(has_bfloat16=False):
        products = [
            torch.matmul(a, b),
            a.matmul(b),
            a @ b,
            torch.nn.functional.linear(a, b[0], bias=bias),
            torch.nn.functional.scaled_dot_product_attention(a, b, b, dropout_p=0.0),
        ]
        (gradient,) = torch.autograd.grad(products[0].float().square().sum(), a)
    x, y = a.detach().float(), b.detach().float()
    expected = [
        *3 * [x @ y],
        x @ y[0].T + bias.float(),
        torch.nn.functional.scaled_dot_product_attention(x, y, y),
    ]
    for product, value in zip(products, expected, strict=True):
        assert product.dtype is torch.bfloat16
        assert torch.equal(product, value.bfloat16())
    assert torch.equal(gradient, ((2 * (x @ y).bfloat16().float()).bfloat16().float() @ y.mT).bfloat16())
