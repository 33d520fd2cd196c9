import math

import pytest
import torch

from celltron.models.geneformer import masked_gene_loss

pytestmark = pytest.mark.usefixtures("one_process")


def test_the_sum_and_the_count_are_those_of_plain_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_MV = 3 * torch.randn(7, 20, generator=generator)
    labels_M = torch.randint(0, 20, (7,), generator=generator)
    expected = -torch.log_softmax(logits_MV.double(), dim=-1)[torch.arange(7), labels_M].sum()
    total, count = masked_gene_loss(logits_MV.clone(), labels_M)
    assert total.dtype is torch.float32 and count.dtype is torch.int32 and int(count) == 7
    assert abs(total.item() - expected.item()) < 1e-5


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary() -> None:
    total, count = masked_gene_loss(torch.zeros(5, 32), torch.arange(5))
    assert math.isclose(total.item() / int(count), math.log(32), rel_tol=1e-6)


def test_gradients_are_probabilities_less_the_label(float64_stays) -> None:
    logits_MV = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels_M = torch.tensor([0, 8, 3, 3])
    expected_MV = torch.softmax(logits_MV.detach(), dim=-1)
    expected_MV[torch.arange(4), labels_M] -= 1.0
    masked_gene_loss(logits_MV.clone(), labels_M)[0].backward()
    torch.testing.assert_close(logits_MV.grad, expected_MV, rtol=0, atol=1e-14)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    total, _ = masked_gene_loss(torch.zeros(3, 16, dtype=torch.bfloat16), torch.arange(3))
    assert total.dtype is torch.float32
    assert math.isclose(total.item(), 3 * math.log(16), rel_tol=1e-6)


def test_no_masked_place_costs_nothing_and_has_a_gradient_of_zero() -> None:
    logits_MV = torch.zeros(0, 16, requires_grad=True)
    total, count = masked_gene_loss(logits_MV * 1.0, torch.zeros(0, dtype=torch.int64))
    assert total.item() == 0.0 and int(count) == 0
    total.backward()
    assert logits_MV.grad.shape == (0, 16)
