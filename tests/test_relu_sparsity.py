"""The measure of zeros against hand-worked cases, and the sparse product against the dense one."""
import numpy as np
import pytest
import torch

import relu_sparsity as script
from conftest import build, inputs, trained

def test_hoyer_by_hand():
    """(3 + 4)^2 / (4 (9 + 16)) = 0.49; equal activations 1; a single one 1 / H; blind to scale."""
    assert script.hoyer(torch.tensor([3.0, 4, 0, 0])).item() == pytest.approx(0.49)
    assert script.hoyer(torch.full((5, 8), 0.3)).item() == pytest.approx(1)
    assert script.hoyer(torch.eye(8)).item() == pytest.approx(1 / 8)
    h = torch.rand(4, 16)
    assert script.hoyer(h).item() == pytest.approx(script.hoyer(100 * h).item())

def test_sparse_product_equals_dense():
    """Rows that are empty, full and mixed, the first and the last among them."""
    torch.manual_seed(0)
    h, weight = torch.randn(40, 24).relu(), torch.randn(24, 7)
    h[[0, 5, 6, 39]] = 0
    h[10] = 1
    assert torch.allclose(script.sparse_product(h, weight), h @ weight, atol=1e-5)
    assert torch.equal(script.sparse_product(torch.zeros(3, 24), weight), torch.zeros(3, 7))

def test_macs_count_each_neuron_that_fired(dataset):
    """All neurons on, none on, and one on in one layer. At threshold 0 it is the static network."""
    model, x = build(script, dataset), inputs(dataset, count=2)
    C, H, T = 32, 128, 64
    with torch.no_grad():
        for run in (model.masked, model.skipping):
            assert torch.allclose(run(x, 0.0)[0], model.net(x), atol=1e-4)
        for bias, fired in ((100.0, H), (-100.0, 0)):
            for block in model.net.blocks:
                block.mlp[0].bias.fill_(bias)
            _, macs, token_macs = model.skipping(x, 0.0)
            assert macs.tolist() == [model.net.macs - 2 * T * (H - fired) * C] * 2
        model.net.blocks[1].mlp[0].bias[7] = 100.0
        _, macs, one = model.skipping(x, 0.0)
    assert macs.tolist() == [model.net.macs - 2 * T * H * C + T * C] * 2
    assert torch.equal(one, token_macs + C)

@torch.no_grad()
def test_density_is_what_hooks_count():
    """In ten batches, where sums of rounded shares would miss 1; float64 keeps all signs as they are."""
    model, captured = build(script, "shapes").double(), []
    x = inputs("shapes", count=1000, dtype=torch.float64)
    model.net.blocks[0].mlp[0].bias[:5] = 100.0
    model.net.blocks[1].mlp[0].bias[:7] = -100.0
    for block in model.net.blocks:
        block.mlp[0].register_forward_hook(lambda m, i, z: captured.append((z > 0).numpy()))
    model.net(x)
    fired = np.stack(captured[:2])                                          # (L, 1000, T, H)
    by_example, by_neuron = script.measure_density(model, x)
    assert np.allclose(by_example, fired.mean((2, 3)).T, atol=1e-6)
    assert np.allclose(by_neuron, fired.mean((1, 2)), atol=1e-6)
    assert (by_neuron[0] == 1).sum() == 5 and (by_neuron[1] == 0).sum() >= 7

def test_the_penalty_makes_activations_sparser():
    """The same steps with and without it, from the same start."""
    densities = []
    for weight in ("0", "1"):
        model, _, few = trained(script, 60, "--sparsity-weight", weight)
        densities.append(script.measure_density(model, few[0])[0].mean())
    assert densities[1] < 0.7 * densities[0]
