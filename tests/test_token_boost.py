"""Learners in order, each a part of its MLP; gates that learn; a price that meets the budget."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import token_boost as script
from conftest import build, inputs, trained

class Forced(nn.Module):
    """A gate that wants a given number of learners for every token, whatever it reads."""

    def __init__(self, count, learners):
        super().__init__()
        self.scores = count[..., None] - torch.arange(learners) - 0.5               # (B, T, N)

    def forward(self, x, noise=False):
        return self.scores

def naive(mlp, x, k):
    """The bias and the first k learners, one neuron after the other: x (C,) -> (C,)."""
    y = mlp.down.bias.clone()
    for j in range(k * len(mlp.up.bias) // mlp.learners):
        y += mlp.down.weight[:, j] * max(0.0, (mlp.up.weight[j] @ x + mlp.up.bias[j]).item())
    return y

@torch.no_grad()
@pytest.mark.parametrize("learners", (4, 8))
def test_every_count_in_one_batch(dataset, learners):
    """Side by side: each token gets the sum of its first k learners, whatever its neighbours get."""
    model = build(script, dataset, "tiny", "--learners", str(learners)).double()
    x = inputs(dataset, count=3, dtype=torch.float64)
    count = [torch.arange(3 * 64).view(3, 64) % (learners + 1),
             torch.arange(3 * 64).view(3, 64) // 7 % (learners + 1)]
    count[0][0] = 2                                             # an example without the largest count
    gate_macs = model.gates[0].macs
    assert gate_macs == 32 * 16 + 16 * learners
    model.gates = nn.ModuleList(Forced(c, learners) for c in count)
    state = model.net.embed(x)
    for block, c in zip(model.net.blocks, count):
        state = state + torch.stack([naive(block.mlp, v, k) for v, k in zip(
            block.mix(state).flatten(0, 1), c.flatten().tolist())]).view_as(state)
    expected = model.net.head(state)
    for run in (model.masked, model.skipping):
        logits, macs, token_macs = run(x, 0.0)
        assert torch.allclose(logits, expected, atol=1e-10, rtol=0)
        # by hand, C = 32: convolutions and gates of two layers, the head of a text, the learners' neurons
        fixed = 2 * (model.net.blocks[0].conv.weight.numel() + gate_macs) + (128 * 32 if dataset == "pydoc" else 0)
        assert torch.equal(token_macs, fixed + sum(count) * 2 * 32 * (128 // learners))
        assert torch.equal(macs, token_macs.sum(1) + model.net.example_macs)
    for i in range(3):
        model.gates = nn.ModuleList(Forced(c[i:i + 1], learners) for c in count)
        assert torch.allclose(model.skipping(x[i:i + 1], 0.0)[0], expected[i], atol=1e-10, rtol=0)

@torch.no_grad()
def test_the_ends_are_the_static_network_and_its_biases(dataset):
    """And with k learners for every token, each MLP is its first k."""
    model, x = build(script, dataset), inputs(dataset, count=3)
    gates = 2 * 64 * (16 * 32 + 16 * 4)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, model.net(x), atol=1e-4)
        assert macs.tolist() == [model.net.macs + gates] * 3
        assert run(x, model.cheapest)[1].tolist() == [model.net.macs + gates - 2 * 64 * 8 * 32 ** 2] * 3
    for k in range(5):
        logits, macs, _ = model.even(x, k)
        assert macs.tolist() == [model.net.macs + gates - (4 - k) * 2 * 64 * 2 * 32 ** 2] * 3
        short = build(script, dataset)
        for block in short.net.blocks:
            block.mlp.down.weight[:, 32 * k:] = 0
        assert torch.allclose(logits, short.net(x), atol=1e-4)
    for block in model.net.blocks:
        block.mlp.down.weight.zero_()
    assert torch.allclose(model.skipping(x, model.cheapest)[0], model.net(x), atol=1e-4)

@torch.no_grad()
def test_scores_never_rise_and_noise_is_logistic():
    """A learner above 0 with noise: as often as the sigmoid of its score says, if it is the first."""
    torch.manual_seed(0)
    gate = script.Gate(32, 4)
    x = torch.randn(100, 32)
    assert (gate(x).diff() <= 0).all() and (gate(x, noise=True).diff() <= 0).all()
    many = x[:1].expand(200000, -1)
    often = (gate(many, noise=True)[:, 0] > 0.7).float().mean().item()
    assert often == pytest.approx((gate(x[:1])[0, 0] - 0.7).sigmoid().item(), abs=0.005)

def test_gates_learn_to_leave_out_a_learner_that_hurts():
    """Only the last learner of the last layer writes, and what it writes makes every answer wrong."""
    torch.manual_seed(0)
    model, x, y = build(script), inputs("shapes", count=16), torch.zeros(16).long()
    with torch.no_grad():
        for gate in model.gates:
            gate.out.weight.normal_(std=0.001)
            gate.out.bias.copy_(torch.tensor([9.0, 6, 3, 0]))           # the last is seldom cut by others
        model.net.blocks[1].mlp.down.weight.zero_()
        model.net.out.weight.zero_()
        model.net.out.weight[0, 0] = -1.0
        model.net.blocks[1].mlp.down.weight[0, -32:] = 1.0
    total = torch.zeros(4)
    for _ in range(20):
        loss = F.cross_entropy(model.dense(x)[0], y)
        total += torch.autograd.grad(loss, model.gates[1].out.bias)[0]
    assert total[3] > 0 and total[3] > 3 * total[:3].abs().max()        # less of the last

def test_an_eighth_runs_all_and_an_eighth_the_same():
    torch.manual_seed(0)
    model, x = build(script), inputs("shapes", count=32)
    model.price = torch.tensor(1000.0)
    logits, runs, _ = model.dense(x)
    assert runs[:, :4].all() and not runs[:, 8:].any()
    assert torch.allclose(logits[:4], model.net(x)[:4], atol=1e-5)
    assert (runs[:, 4:8] == runs[:, 4:8, :1]).all()                     # all tokens of an example alike
    assert torch.equal(runs[0, 4:8], runs[1, 4:8])                     # and all layers
    many = torch.cat([model.dense(x)[1][:, 4:8].sum(-1).detach() for _ in range(50)], 1)
    assert many.unique().tolist() == [0, 1, 2, 3, 4] and many.float().mean() == pytest.approx(2, abs=0.3)
    model.price = torch.tensor(0.0)
    assert model.dense(x)[1].unique().tolist() == [0, 1]                # not 0.9999, which would count as 0

def test_the_price_meets_a_budget():
    """Scores of which a known share is above the price, as many as the budget buys by hand."""
    model = build(script)
    scores = torch.rand(1, 700000)
    least, most = (model.masked(inputs("shapes", count=1), end)[1].item() / model.net.macs
                   for end in (model.cheapest, model.full))
    for budget in (0.4, 0.9):
        model.meet(budget, scores)
        share = (scores > model.price).float().mean().item()
        assert least + share * (most - least) == pytest.approx(budget, abs=0.01)
    for budget, price in ((0.01, 1.0), (9.0, 0.0)):
        model.meet(budget, scores)
        assert model.price.item() == pytest.approx(price, abs=1e-3)

@torch.no_grad()
def test_sorting_neurons_changes_nothing_but_their_order():
    model, x = build(script), inputs("shapes")
    before, mlp = model.net(x), model.net.blocks[1].mlp
    weight = mlp.up.weight.clone()
    model.sort(x)
    assert torch.allclose(model.net(x), before, atol=1e-5) and not torch.equal(mlp.up.weight, weight)
    state = model.net.blocks[0](model.net.embed(x))
    use = mlp.up(model.net.blocks[1].mix(state)).relu().mean((0, 1)) * mlp.down.weight.norm(dim=0)
    assert (use.diff() < 1e-6).all() and use[0] > 2 * use[-1]

@torch.no_grad()
def test_sorting_in_bfloat16_finds_the_same_neurons():
    """Autocast keeps copies of weights: a layer must not be measured behind one that is half sorted."""
    orders, x = [], inputs("shapes", count=64)
    for half in (False, True):
        model = build(script, "shapes", "tiny", "--depth", "4")
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.sort(x)
        orders.append([{row.sum().item() for row in block.mlp.up.weight[:64]} for block in model.net.blocks])
    for one, other in zip(*orders):
        assert len(one & other) >= 60               # of the 64 most useful

def test_sorting_in_the_middle_of_a_step_in_bfloat16():
    """Autocast keeps copies of weights; the gradient must be that of a network sorted before."""
    x, y, gradients = inputs("shapes", count=16), torch.arange(16) % 10, []
    model, twin = build(script).train(), build(script).train()
    for each in (model, twin):
        each.price = torch.tensor(0.1)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            loss, _ = each.loss(x, y, 0.2)
        loss.backward()
        gradients.append(each.net.blocks[1].mlp.up.weight.grad)
        twin.load_state_dict(model.state_dict())
        twin.sorted = True
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-4

def test_training_boosts_and_meets_the_budget():
    """On text: every prefix works, a longer one better; the price of training spends the budget."""
    model, data, few = trained(script, 200, "--budget", "0.6")
    losses = [script.evaluate(model, model.even, few, k)["means"]["loss"] for k in range(5)]
    assert sorted(losses, reverse=True) == losses and losses[1] < losses[0] - 0.1
    threshold = script.calibrate(model, [part[:100] for part in data["calibration"]], 0.6)
    result = script.evaluate(model, model.skipping, few, threshold)
    assert result["means"]["budget"] == pytest.approx(0.6, abs=0.05)
