"""The layer against PyTorch's own post-norm encoder layer."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_process")


@torch.no_grad()
def make_reference(layer: torch.nn.Module, num_heads: int) -> torch.nn.TransformerEncoderLayer:
    """PyTorch's layer with the weights of ours; its joint projection stands as q, k, v instead of head by head."""
    own = dict(layer.named_parameters())
    width, inner = own["attention_norm.weight"].shape[0], own["mlp.linear_fc1.bias"].shape[0]
    reference = torch.nn.TransformerEncoderLayer(
        width, num_heads, inner, dropout=0.0, activation="relu", layer_norm_eps=1e-12, batch_first=False
    ).to(torch.float64)
    names = {
        "self_attn.out_proj": "self_attention.linear_proj",
        "linear1": "mlp.linear_fc1",
        "linear2": "mlp.linear_fc2",
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
    }
    state = {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for theirs, ours in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        joint = own[f"self_attention.linear_qkv.{kind}"]
        rows = torch.arange(3 * width).reshape(num_heads, 3, -1).transpose(0, 1).flatten()
        state[f"self_attn.in_proj_{kind}"] = joint[rows]
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize("lengths", [None, (8, 5, 1)], ids=["unpadded", "padded"])
def test_output_and_gradients_are_those_of_pytorch(make_model, lengths) -> None:
    layer = make_model(dtype=torch.float64).encoder.layers[0]
    # In training, so that PyTorch does not take its inference path; there is no dropout in either.
    reference = make_reference(layer, 4).train()
    layer.train()
    hidden_SBD = torch.randn(8, 3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    is_padding_BS = None if lengths is None else torch.arange(8)[None, :] >= torch.tensor(lengths)[:, None]
    is_token_SB = torch.ones(8, 3, dtype=torch.bool) if is_padding_BS is None else ~is_padding_BS.T
    ours_in, theirs_in = hidden_SBD.clone().requires_grad_(), hidden_SBD.clone().requires_grad_()
    mask = None if is_padding_BS is None else is_padding_BS[:, None, None, :]
    ours, context = layer(hidden_states=ours_in, attention_mask=mask)
    theirs = reference(theirs_in, src_key_padding_mask=is_padding_BS)
    assert context is None
    torch.testing.assert_close(ours[is_token_SB], theirs[is_token_SB], rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for output in (ours, theirs):
        (output * weights)[is_token_SB].sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-12)
    for ours_name, theirs_name in (("mlp.linear_fc1", "linear1"), ("attention_norm", "norm1"), ("mlp_norm", "norm2")):
        own = layer.get_submodule(ours_name).weight.grad
        torch.testing.assert_close(own, reference.get_submodule(theirs_name).weight.grad, rtol=0, atol=1e-11)
