"""The trick, the gates at three grains, and what they are told about the budget."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gumbel_gates as script
from conftest import build, inputs, trained

grains = pytest.mark.parametrize("grain", ("layer", "token", "group"))
ESTIMATORS = ("gumbel", "sigmoid_st", "reinforce")

def gated(dataset="shapes", *options):
    """Three blocks, two of them with gates."""
    return build(script, dataset, "tiny", "--depth", "3", *options)

def test_samples_follow_the_softmax():
    """Chi-square of 20,000 samples of 4 choices, 3 degrees of freedom: 16.27 leaves 0.1 % above."""
    torch.manual_seed(0)
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0])
    samples = script.gumbel_softmax(scores.expand(20000, 4), temperature=1.0)
    assert torch.equal(samples, samples.round()) and torch.equal(samples.sum(1), torch.ones(20000))
    expected = 20000 * scores.softmax(-1)
    assert ((samples.sum(0) - expected).square() / expected).sum() < 16.27
    uniform = torch.full((4,), 5000.0)                      # the test can tell: not from a uniform
    assert ((samples.sum(0) - uniform).square() / uniform).sum() > 1000
    z = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])                               # k = 2
    for estimator in ("gumbel", "reinforce"):
        mean = script.sample_gates(z.expand(40000, 5), estimator).mean(0)
        assert torch.allclose(mean, z.sigmoid(), atol=0.012)
    assert script.sample_gates(z, "sigmoid_st").tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(AssertionError, match="none of"):
        script.sample_gates(z, "Gumbel")

def test_the_gradient_is_that_of_the_relaxation():
    """Against torch's own Gumbel-softmax with the same noise, and by hand for k = 2."""
    weight, gradients = torch.randn(6, 5), []
    for sampler in (script.gumbel_softmax, lambda s, t: F.gumbel_softmax(s, t, hard=True)):
        scores = torch.linspace(-1, 1, 30).view(6, 5).requires_grad_()
        torch.manual_seed(3)
        out = sampler(scores, 0.7)
        (out * weight).sum().backward()
        gradients.append((out.detach(), scores.grad))
    assert torch.allclose(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1], gradients[1][1], atol=1e-6)
    z = torch.tensor([0.3, -1.2], requires_grad=True)
    torch.manual_seed(5)
    script.sample_gates(z, "gumbel").sum().backward()
    torch.manual_seed(5)
    noise = -torch.empty(2, 2).exponential_().log()
    p = (z.detach() + noise[:, 0] - noise[:, 1]).sigmoid()          # logistic noise on z
    assert torch.allclose(z.grad, p * (1 - p), atol=1e-6)
    z.grad = None
    script.sample_gates(z, "sigmoid_st").sum().backward()
    assert torch.allclose(z.grad, z.detach().sigmoid() * (1 - z.detach().sigmoid()))

def test_reinforce_weighs_the_task_as_the_mean_loss_does(monkeypatch):
    """64 copies of an image, eight with open gates: every outcome is run once, and counts as often as
    it was drawn, against the greedy gates; the task's own gradient, through sigmoid(z), adds to it."""
    model, y = gated("shapes", "--grain", "layer", "--estimator", "reinforce").double(), torch.full((64,), 3)
    model.budget_weight = 0.0
    for gate in model.gates:
        torch.nn.init.constant_(gate.out.bias, 0.5)
    x, parameters = inputs("shapes", count=1).double().expand(64, -1, -1, -1), list(model.gates.parameters())
    drawn = []
    sample = script.sample_gates
    monkeypatch.setattr(script, "sample_gates", lambda z, e: drawn.append(sample(z, e)) or drawn[-1])
    torch.manual_seed(0)
    got = torch.autograd.grad(model.loss(x, y, 1.0)[0], parameters)
    gates = torch.stack(drawn[:2], 1)[8:]                                               # (56, L, 1, 1)
    outcomes, counts = gates.unique(dim=0, return_counts=True)
    assert counts.sum() == 56 and len(outcomes) == 4
    greedy = F.cross_entropy(model.masked(x[:1], 0.0)[0], y[:1])
    total = F.cross_entropy(model.masked(x[:1], model.full)[0], y[:1]) / 8
    for outcome, count in zip(outcomes, counts):
        logits, _, z = model.dense(x[:1], decisions=outcome[:, None])
        log_p = torch.where(outcome[:, None] > 0, F.logsigmoid(z), F.logsigmoid(-z)).sum()
        loss = F.cross_entropy(logits, y[:1])
        total = total + count / 64 * (loss + (loss - greedy).detach() * log_p)
    for a, b in zip(got, torch.autograd.grad(total, parameters)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6) and b.abs().max() > 0

@grains
def test_the_ends(grain, dataset):
    """All open: every unit times sigmoid of its score. All closed: the first block, output biases,
    and convolutions unless whole blocks are closed. Gates always have their MACs."""
    model, x = gated(dataset, "--grain", grain), inputs(dataset, count=3)
    rows, units = 64 if grain == "token" or dataset == "pydoc" else 1, 4 if grain == "group" else 1
    gates = 2 * rows * (32 * 16 + 16 * units)
    first, *others = model.net.blocks
    with torch.no_grad():
        whole = first(model.net.embed(x))
        bare = model.net.head(whole + sum(block.mlp[2].bias for block in others))
        for block, gate in zip(others, model.gates):
            seen = block.norm(whole) if rows == 64 else block.norm(whole).mean(1, keepdim=True)
            p, h = gate(seen).sigmoid(), block.mlp[1](block.mlp[0](block.mix(whole)))
            whole = whole + block.mlp[2].bias
            for u in range(units):
                mine = slice(u * 128 // units, (u + 1) * 128 // units)
                whole = whole + p[..., u:u + 1] * (h[..., mine] @ block.mlp[2].weight[:, mine].T)
        whole = model.net.head(whole)
    convolutions = 1 if grain == "layer" and dataset == "shapes" else 3
    conv = convolutions * 64 * first.conv.weight.numel()
    fixed = 64 * 128 * 32 if dataset == "pydoc" else 256 * 27 * 16 + 64 * 9 * 16 * 32 + 320
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, whole, atol=1e-4)
        assert macs.tolist() == [model.net.macs + gates] * 3
        logits, macs, _ = run(x, model.cheapest)
        assert torch.allclose(logits, bare, atol=1e-4)
        assert macs.tolist() == [fixed + conv + 64 * 8 * 32 * 32 + gates] * 3

@pytest.mark.parametrize("estimator", ESTIMATORS)
@grains
def test_the_task_alone_moves_every_gate(grain, dataset, estimator):
    model = gated(dataset, "--grain", grain, "--estimator", estimator)
    x, model.budget_weight = inputs(dataset, count=32), 0.0
    torch.manual_seed(0)
    y = torch.randint(10, (32, 64) if dataset == "pydoc" else (32,))
    loss, _ = model.loss(x, y, 0.5)
    for gradient in torch.autograd.grad(loss, [gate.out.bias for gate in model.gates]):
        assert (gradient != 0).all()                                            # of every unit

@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_by_hand(estimator):
    """Gates that never open by themselves: an eighth of the batch runs everything; the budget, halfway
    between 1 and its value, is about the others."""
    model, x = gated("shapes", "--estimator", estimator), inputs("shapes", count=16)
    for gate in model.gates:
        torch.nn.init.constant_(gate.out.bias, -20.0)
    y = torch.arange(16) % 10
    with torch.no_grad():
        apart = [model.masked(x[:2], model.full)[0], model.masked(x[2:], 0.0)[0]]
        logits, gates, _ = model.dense(x, opened=2)
        assert torch.allclose(logits, torch.cat(apart), atol=1e-5)
        assert gates[:, :2].all() and not gates[:, 2:].any()
        loss, shown = model.loss(x, y, 0.35)
        macs = model.masked(x, model.cheapest)[1][0] / model.net.macs
        task = F.cross_entropy(logits, y)
        assert shown["loss"].item() == pytest.approx(task.item(), rel=1e-5)
        assert shown["macs"].item() == pytest.approx(macs.item())
        assert loss.item() == pytest.approx((task + 10 * (macs - 0.75) ** 2).item(), rel=1e-5)

def test_the_budget_is_for_the_batch_not_for_the_example():
    """Half of the examples open, half closed: as if each ran one block of two; in a gradient, too."""
    model = gated("shapes", "--grain", "layer")
    uneven = torch.tensor([1.0, 1, 0, 0]).view(1, 4, 1, 1).expand(2, -1, -1, -1).clone().requires_grad_()
    even = torch.tensor([1.0, 0]).view(2, 1, 1, 1).expand(-1, 4, -1, -1)
    macs = model.count_macs(uneven)[0]
    assert macs.mean() == model.count_macs(even)[0].mean() and len(macs.unique()) == 2
    macs.mean().backward()
    assert torch.allclose(uneven.grad, torch.full_like(uneven, 64 * model.net.block_macs / 4))
    assert model.count_macs(uneven.long())[0].tolist() == macs.tolist()

def test_training_meets_the_budget():
    """A few hundred steps on text: at threshold 0, the rule of training, MACs are near the budget."""
    model, data, few = trained(script, 400, "--budget", "0.7", "--depth", "3")
    spent = script.evaluate(model, model.masked, few, 0.0)["means"]["budget"]
    assert spent == pytest.approx(0.7, abs=0.15)
    threshold = script.calibrate(model, [part[:100] for part in data["calibration"]], 0.7)
    assert script.evaluate(model, model.skipping, few, threshold)["means"]["budget"] == pytest.approx(
        0.7, abs=0.06)

def test_mutual_information_by_hand():
    """A gate that is the class, one that ignores it, and one that is open for 3/4 and 1/4."""
    label = np.repeat([0, 1], 8)
    gates = np.stack([label == 1, np.arange(16) % 2 == 0,
                      np.r_[np.arange(8) < 6, np.arange(8) < 2]], 1)
    h = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert script.mutual_information(gates, label) == pytest.approx([1.0, 0.0, 1 - h])

def test_gate_gradients_are_noisy_in_the_known_order(monkeypatch):
    """Straight-through sigmoid has no noise at all, REINFORCE more than the trick; and a known one: the
    length of a mean of 30 is not that of the mean."""
    torch.manual_seed(0)
    model = gated()
    x, y = torch.randint(256, (64, 3, 32, 32)).byte(), torch.randint(10, (64,))
    noise = {each: script.gradient_noise(model, x, y, each) for each in ESTIMATORS}
    assert noise["sigmoid_st"] < 1e-3 and noise["sigmoid_st"] < noise["gumbel"]
    assert not noise["reinforce"] < noise["gumbel"]                             # it may be NaN

    def noisy(x, y, progress):          # every gradient has mean 1 and standard deviation 3
        return sum((p * (1 + 3 * torch.randn_like(p))).sum() for p in model.gates.parameters()), {}

    monkeypatch.setattr(model, "loss", noisy)
    for estimator in ESTIMATORS:
        known = script.gradient_noise(model, x, y, estimator)
        assert known == pytest.approx(3.0, rel=0.1)
