"""The promises of every script: dense, masked and skipping agree, and the MACs are those that ran."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import build, configure, inputs, scripts, thresholds

@pytest.fixture(params=[(name,) for name in scripts] + [
    ("gumbel_gates", "--grain", "layer"), ("gumbel_gates", "--grain", "group")], ids=" ".join)
def script(request):
    """Every script in turn, and variants of some."""
    name, *more = request.param
    module = scripts[name]
    return SimpleNamespace(SCRIPT=name, Model=module.Model, StaticNet=module.StaticNet,
                           options=lambda argv: module.options([*argv, *more]))

@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("trains" in request.node.name):
        yield

# torch's counter does not know embedding_bag: a multiply and an add for each number it reads.
BAGS = {op: lambda weight, indices, *args, **kwargs: 2 * indices[0] * weight[1]
        for op in (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)}

def executed_macs(run, *args):
    """The MACs that torch's dispatcher sees, in the shapes of the operands, while run(*args) runs."""
    with FlopCounterMode(display=False, custom_mapping=BAGS) as counter:
        result = run(*args)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2, result

@pytest.mark.parametrize("size", ("tiny", "small", "base"))
def test_macs_are_what_ran(script, dataset, size):
    """Of static networks; of batches and single examples at several thresholds; to the last MAC."""
    for options in ((), ("--width", "24", "--depth", "3")):
        net = script.StaticNet(configure(script, dataset, size, *options)).eval()
        assert executed_macs(net, inputs(dataset, size, 1))[0] == net.macs
    model, x = build(script, dataset, size), inputs(dataset, size, 1 if size == "base" else 3)
    seen = set()
    for threshold in thresholds(model, x):
        for some in (x, *x.split(1)):
            executed, (_, macs, token_macs) = executed_macs(model.skipping, some, threshold)
            assert executed == macs.sum()
            assert macs.dtype == token_macs.dtype == torch.int64
            assert token_macs.shape == (len(some), model.net.position.shape[0])
            assert token_macs.min() >= 0 and (token_macs.sum(1) <= macs).all()
            seen.update(macs.tolist())
    assert len(seen) > 1                        # the thresholds did make a difference

def test_shorter_texts_cost_less(script):
    """Windows of 1 and of 17 characters, of the 64 that the network was made for."""
    model, x = build(script, "pydoc"), inputs("pydoc", count=2)
    for T in (1, 17):
        for threshold in thresholds(model, x, (0.2, 0.6)):
            for example in x[:, :T].split(1):
                executed, (logits, macs, token_macs) = executed_macs(model.skipping, example, threshold)
                expected = model.masked(example, threshold)
                assert executed == macs.item() == expected[1].item()
                assert token_macs.shape == (1, T) and torch.equal(token_macs, expected[2])
                assert torch.allclose(logits, expected[0], atol=1e-4, rtol=0)

def test_masked_says_what_skipping_does(script, dataset):
    """In float32 rounding may turn a few of the many decisions of a ReLU network, in float64 none."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        model, x = build(script, dataset).to(dtype), inputs(dataset, count=16, dtype=dtype)
        for threshold in thresholds(model, x):
            masked, skipping = model.masked(x, threshold), model.skipping(x, threshold)
            assert torch.allclose(masked[0], skipping[0], atol=tolerance, rtol=0)
            assert masked[1].shape == (16,) and masked[2].shape == (16, 64)
            if dtype == torch.float64 or script.SCRIPT != "relu_sparsity":
                assert torch.equal(masked[1], skipping[1]) and torch.equal(masked[2], skipping[2])
            else:
                assert (masked[2] != skipping[2]).float().mean() < 1e-3

def test_dense_takes_decisions(script, dataset):
    """Those of a threshold give what the threshold gives; those of another do not."""
    model, x = build(script, dataset), inputs(dataset)
    threshold = thresholds(model, x, (0.5,))[0]
    logits, decisions = model.dense(x, threshold)[:2]
    hard = [(d > 0).float() for d in decisions]
    assert torch.allclose(model.dense(x, decisions=hard)[0], logits, atol=1e-5)
    others = [[(d > 0).float() for d in model.dense(x, end)[1]] for end in (model.cheapest, model.full)]
    assert any(not torch.allclose(model.dense(x, decisions=other)[0], logits, atol=1e-3) for other in others)

def test_an_example_does_not_depend_on_its_neighbours(script, dataset):
    model, x = build(script, dataset).double(), inputs(dataset, count=256, dtype=torch.float64)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    for threshold in thresholds(model, x[:32], (0.3, 0.7)):
        batch, shuffled = model.skipping(x, threshold), model.skipping(x[order], threshold)
        alone = [torch.cat(part) for part in
                 zip(*(model.skipping(x[i:i + 1], threshold) for i in range(0, 256, 32)))]
        for whole, mixed, single in zip(batch, shuffled, alone):
            assert torch.allclose(whole[order].double(), mixed.double(), atol=1e-10, rtol=0)
            assert torch.allclose(whole[::32].double(), single.double(), atol=1e-10, rtol=0)
        assert len(batch[1].unique()) > 1

def test_text_never_looks_ahead(script):
    """Changing later characters changes no earlier logits and no earlier compute."""
    model, x = build(script, "pydoc").double(), inputs("pydoc", count=8)
    for threshold in thresholds(model, x):
        for run in (model.masked, model.skipping):
            logits, _, token_macs = run(x, threshold)
            for cut in (1, 17, 63):
                changed = x.clone()
                changed[:, cut:] = (changed[:, cut:] - 32 + 41) % 95 + 32
                other, _, other_macs = run(changed, threshold)
                assert torch.allclose(logits[:, :cut], other[:, :cut], atol=1e-10, rtol=0)
                assert torch.equal(token_macs[:, :cut], other_macs[:, :cut])
                assert not torch.allclose(logits[:, cut:], other[:, cut:])

def test_the_loss_trains_everything(script, dataset):
    """A scalar, finite numbers for the progress bar, and a gradient for every parameter."""
    model, x = build(script, dataset).train(), inputs(dataset, count=16)
    y = torch.randint(10, (16, 64) if dataset == "pydoc" else (16,))
    for progress in (0.0, 0.5, 1.0):
        loss, shown = model.loss(x, y, progress)
        assert loss.ndim == 0 and all(np.isfinite(value.item()) for value in shown.values())
        loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

@pytest.mark.parametrize("name", ("gumbel_gates", "token_boost"))
def test_a_network_trains_before_its_gates_join(name):
    """Before, the loss is the static network's, and no gate has a gradient; then all parameters do."""
    model, x, y = build(scripts[name]).train(), inputs("shapes", count=16), torch.arange(16) % 10
    loss, _ = model.loss(x, y, 0.19)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(model.net(x), y).item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in model.gates.parameters())
    model.loss(x, y, 0.2)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

def test_convolution_by_hand(dataset):
    """Tokens within reach of the kernel mix, channel by channel, on text only those before; the
    residual stream is left alone: where the MLP is silent, a token keeps its state."""
    block = build(scripts["relu_sparsity"], dataset).net.blocks[0]
    weight, bias, k = block.conv.weight, block.conv.bias, block.conv.weight.shape[2]
    x = torch.randn(1, 64, 32)
    z, mixed = block.norm(x)[0], block.mix(x)[0]
    for token in (0, 9, 27, 63):
        expected = z[token] + bias
        for i in range(k):
            for j in range(weight.shape[3]):
                if dataset == "pydoc":
                    neighbour = token - (k - 1) + i
                    inside = neighbour >= 0
                else:
                    row, column = token // 8 + i - k // 2, token % 8 + j - k // 2
                    neighbour, inside = 8 * row + column, 0 <= row < 8 and 0 <= column < 8
                if inside:
                    expected += weight[:, 0, i, j] * z[neighbour]
        assert torch.allclose(mixed[token], expected, atol=1e-5)
    for parameter in block.mlp.parameters():
        parameter.zero_()
    assert torch.equal(block(x), x)
