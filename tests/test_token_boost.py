"""Learners in order, each from its own prefix; gates that learn; labels; counts that cost what they run."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import token_boost as script
from conftest import build, configure, inputs, steps

DATASETS = ("shapes", "pydoc")


class Forced(nn.Module):
    """A gate that wants a given number of learners for every token, whatever it reads."""

    def __init__(self, count, learners):
        super().__init__()
        self.logits = 50.0 * F.one_hot(count, learners + 1).double()                    # (B, T, N + 1)

    def forward(self, x):
        return self.logits


def naive(mlp, x, k):
    """The bias and the first k learners, one neuron after the other: x (C,) -> (C,)."""
    y = mlp.down.bias.clone()
    for j in range(k * len(mlp.up.bias) // mlp.learners):
        y += mlp.down.weight[:, j] * max(0.0, (mlp.up.weight[j] @ x + mlp.up.bias[j]).item())
    return y


@torch.no_grad()
@pytest.mark.parametrize("learners", (4, 8))
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_count_in_one_batch(dataset, learners):
    """All counts from 0 to N stand side by side, in every layer. Each token gets the sum of its first
    k learners; what its neighbours get, the most in the batch included, changes nothing."""
    model = build(script, dataset, "tiny", "--learners", str(learners)).double()
    x = inputs(dataset, count=3)
    x = x.double() if x.is_floating_point() else x
    count = [torch.arange(3 * 64).view(3, 64) % (learners + 1),
             torch.arange(3 * 64).view(3, 64) // 7 % (learners + 1)]
    count[0][0] = 2                                             # an example without the largest count
    gate_macs = model.gates[0].macs
    assert gate_macs == 32 * 16 + 16 * (learners + 1)
    model.gates = nn.ModuleList(Forced(c, learners) for c in count)
    state = model.net.embed(x)
    for block, c in zip(model.net.blocks, count):
        state = state + torch.stack([naive(block.mlp, v, k) for v, k in zip(
            block.mix(state).flatten(0, 1), c.flatten().tolist())]).view_as(state)
    expected = model.net.head(state)
    for run in (model.masked, model.skipping):
        logits, macs, token_macs = run(x, 0.5)
        assert torch.allclose(logits, expected, atol=1e-10, rtol=0)
        # by hand, C = 32: convolutions and gates of two layers, the head of a text, the learners' neurons
        fixed = 2 * (model.net.blocks[0].conv.weight.numel() + gate_macs) + (128 * 32 if dataset == "pydoc" else 0)
        assert torch.equal(token_macs, fixed + sum(count) * 2 * 32 * (128 // learners))
        assert torch.equal(macs, token_macs.sum(1) + model.net.example_macs)
    for i in range(3):
        model.gates = nn.ModuleList(Forced(c[i:i + 1], learners) for c in count)
        assert torch.allclose(model.skipping(x[i:i + 1], 0.5)[0], expected[i], atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_ends_are_the_static_network_and_its_biases(dataset):
    model, x = build(script, dataset), inputs(dataset, count=3)
    gates = 2 * 64 * (16 * 32 + 16 * 5)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, model.net(x), atol=1e-4)
        assert macs.tolist() == [model.net.macs + gates] * 3
        assert run(x, model.cheapest)[1].tolist() == [model.net.macs + gates - 2 * 64 * 8 * 32 ** 2] * 3
    for block in model.net.blocks:
        block.mlp.down.weight.zero_()
    assert torch.allclose(model.skipping(x, model.cheapest)[0], model.net(x), atol=1e-4)


def test_counts_by_hand():
    """At-least sums, and their log-odds, also where P is 1 in all digits of float32; at the start 87
    in 100 tokens run everything."""
    p = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4])
    assert script.at_least(p).tolist() == pytest.approx([0.9, 0.7, 0.7, 0.4])
    odds = [math.log(9), math.log(7 / 3), math.log(7 / 3), math.log(4 / 6)]
    assert script.log_odds(p.log() + 5).tolist() == pytest.approx(odds)
    assert script.log_odds(torch.tensor([0.0, 100.0])).item() == pytest.approx(100)
    gate = script.Gate(32, 4)
    assert gate(torch.zeros(1, 32)).softmax(-1)[0, 4].item() == pytest.approx(0.87, abs=0.01)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_task_alone_reaches_the_gates(dataset):
    model, x = build(script, dataset).train(), inputs(dataset, count=16)
    logits, _ = model.dense(x)
    y = torch.randint(logits.shape[-1], logits.shape[:-1])
    F.cross_entropy(logits.movedim(-1, 1), y).backward()
    for name, parameter in model.gates.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 1e-8, name


def test_gates_learn_to_leave_out_a_learner_that_hurts():
    """Only the last learner of the last layer writes, and what it writes makes every answer wrong."""
    torch.manual_seed(0)
    model, x, y = build(script), inputs("shapes", count=16), torch.zeros(16).long()
    with torch.no_grad():
        for gate in model.gates:
            gate.out.weight.normal_(std=0.001)
            gate.out.bias.zero_()
        model.net.blocks[1].mlp.down.weight.zero_()
        model.net.out.weight.zero_()
        model.net.out.weight[0, 0] = -1.0
        model.net.blocks[1].mlp.down.weight[0, -32:] = 1.0
    total = torch.zeros(5)
    for _ in range(20):
        loss = F.cross_entropy(model.dense(x)[0], y)
        total += torch.autograd.grad(loss, model.gates[1].out.bias)[0]
    assert total[4] > 0 and (total[:4] < 0).all()            # less of N, more of everything else


def test_labels_by_hand():
    """Errors of y_0 to y_4, one column for each token. Not one learner is worth it: 0. All are: 4."""
    errors = torch.tensor([[16.0, 8, 4, 2, 1],          # each halves the error
                           [10, 5, 4.9, 1, 0.5],        # the second does not help, the third would
                           [9, 5, 3, 2, 1.9],           # the fourth gains a factor of 1.05
                           [1.0, 1.1, 0.1, 0.1, 0.1],   # the first hurts
                           [0, 0, 0, 0, 0],             # zero learners make no error at all
                           [1, 0.5, 0, 0, 0],
                           [1, 1, 1, 1, 1]]).T          # nothing helps
    assert script.enough(errors).tolist() == [4, 1, 3, 0, 0, 2, 0]
    assert script.enough(errors, factor=1.01).tolist() == [4, 4, 4, 0, 0, 2, 0]
    assert script.enough(errors[:, None]).shape == (1, 7)


@pytest.mark.parametrize("n", range(5))
def test_a_learner_learns_from_its_own_prefix_only(n):
    """The error of y_n moves learner n, or the bias for n = 0, and nothing else; and by the gradient of
    |y_(n-1) + L_n(x) - y|^2 with y_(n-1) fixed."""
    mlp = build(script).double().net.blocks[0].mlp
    x, y = torch.randn(2, 7, 32).double(), torch.randn(2, 7, 32).double()
    sums = mlp.prefixes(x)
    assert sums.shape == (5, 2, 7, 32) and torch.allclose(sums[4], mlp(x))
    assert torch.allclose(sums[n][0, 0], naive(mlp, x[0, 0], n))
    assert torch.allclose(mlp.first(x, torch.full((2, 7), n)), sums[n])
    parameters = mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias
    gradients = torch.autograd.grad((sums[n] - y).square().sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
    rows = slice(32 * n - 32, 32 * n) if n else slice(0, 0)
    h = (x @ mlp.up.weight[rows].T + mlp.up.bias[rows]).relu()
    expected = [torch.zeros_like(p) for p in parameters]
    residual = 2 * (sums[n] - y).detach()
    back = residual @ mlp.down.weight[:, rows] * (h > 0)
    expected[0][rows] = torch.einsum("bth,btc->hc", back, x)
    expected[1][rows] = back.sum((0, 1))
    expected[2][:, rows] = torch.einsum("btc,bth->ch", residual, h)
    if n == 0:
        expected[3] = residual.sum((0, 1))
    for gradient, e in zip(gradients, expected):
        assert torch.allclose(gradient, e)


@torch.no_grad()
def test_prefix_errors_are_relative_to_each_layer():
    """A model that is its own teacher: no error with all learners; with none, and biases at the mean
    output, exactly the variance, however large what a layer writes is."""
    model, x = build(script), inputs("shapes")
    for factor, block in zip((1.0, 100.0), model.net.blocks):
        block.mlp.down.weight.mul_(factor)
    errors, seen = model.prefix_errors(x)
    assert errors.shape == (2, 5, 8, 64) and errors[:, 4].max() < 1e-8
    assert torch.equal(seen[0], model.net.blocks[0].mix(model.net.embed(x))) and len(seen) == 2
    model.teacher.append(script.copy.deepcopy(model.net))
    for block, trained, h in zip(model.net.blocks, model.teacher[0].blocks, seen):
        block.mlp.down.bias.copy_(trained.mlp(h).mean((0, 1)))
    errors, _ = model.prefix_errors(x)
    assert errors[:, 0].mean((1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


@torch.no_grad()
def test_sorting_neurons_changes_nothing_but_their_order():
    mlp, x = build(script).net.blocks[1].mlp, torch.randn(4, 9, 32)
    before, weight = mlp(x), mlp.up.weight.clone()
    mlp.sort(x)
    assert torch.allclose(mlp(x), before, atol=1e-5) and not torch.equal(mlp.up.weight, weight)
    use = mlp.up(x).relu().mean((0, 1)) * mlp.down.weight.norm(dim=0)
    assert (use.diff() < 1e-6).all() and use[0] > 2 * use[-1]


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_terms_by_hand(dataset, monkeypatch):
    """Sixteen examples, of which two run all; the others half all of two learners, half one of two in
    half of the tokens, in both layers: shares of 1 and 1/4."""
    model, x = build(script, dataset, "tiny", "--learners", "2"), inputs(dataset, count=16)
    runs = torch.ones(2, 16, 64, 2)
    runs[:, 9:, :, 1] = 0
    runs[:, 9:, 32:, 0] = 0
    model.teacher.append(None)                              # as if the phases before were over
    real = model.dense
    monkeypatch.setattr(model, "dense", lambda x: real(x, decisions=runs))
    y = torch.zeros((16, 64) if dataset == "pydoc" else 16).long()
    loss, shown = model.loss(x, y, 0.9)
    logits, _ = real(x, decisions=runs)
    macs = model.count_macs(runs.long())[0][2:].double().mean().item() / model.net.macs
    p = torch.tensor([0.25, 0.25, 0.5])                     # of 0, 1 and 2 learners
    entropy = -(p * p.log()).sum().item() / math.log(3)
    difference = 0.75 / 2 if dataset == "shapes" else 0
    expected = F.cross_entropy(logits.movedim(-1, 1), y).item() + (
        10 * (macs - 0.5) ** 2 - 0.05 * entropy - 0.1 * difference)
    assert loss.item() == pytest.approx(expected, abs=1e-4) and shown["macs"].item() == pytest.approx(macs)


def test_an_eighth_of_the_batch_runs_all_learners():
    model, x = build(script), inputs("shapes", count=16)
    for gate in model.gates:
        nn.init.constant_(gate.out.bias[:1], 1000.0)
    logits, runs = model.dense(x)
    assert runs[:, :2].all() and not runs[:, 2:].any()
    assert torch.allclose(logits[:2], model.net(x)[:2], atol=1e-5)


def test_each_phase_moves_its_own_part():
    """Dense: the network; distil: the MLPs; gates: the gates; by the task: everything. The teacher is
    the network at the end of the first phase, whose neurons were sorted, and stays."""
    model, x = build(script).train(), inputs("shapes", count=16)
    y, moved = torch.arange(16) % 10, {}
    for progress in (0.3, 0.55, 0.68, 0.9):
        model.zero_grad()
        loss, shown = model.loss(x, y, progress)
        loss.backward()
        moved[progress] = {name for name, p in model.named_parameters() if p.grad is not None
                           and p.grad.abs().sum() > 0}
        assert all(value.isfinite() for value in shown.values())
        if progress == 0.55:
            teacher = {name: p.clone() for name, p in model.teacher[0].named_parameters()}
    names = {name for name, _ in model.named_parameters()}
    gates = {name for name in names if name.startswith("gates")}
    assert moved[0.3] == names - gates and moved[0.68] == gates and moved[0.9] == names
    assert moved[0.55] == {name for name in names if ".mlp." in name}
    assert all(torch.equal(p, teacher[name]) for name, p in model.teacher[0].named_parameters())
    assert not any("teacher" in name for name in model.state_dict())


def test_training_boosts_and_meets_the_budget():
    """The phases on text: the first learners stand in for the trained MLP, in every layer."""
    torch.manual_seed(0)
    cfg = configure(script, "pydoc", "tiny", *steps(200), "--budget", "0.6")
    data, model = script.load_data(cfg), script.Model(cfg)
    script.train(model, data, cfg)
    errors = model.prefix_errors(script.network_input(data["calibration"][0][:50]))[0].mean((2, 3))
    assert (errors.diff() < 0.01).all() and (errors[:, 1] < 0.9 * errors[:, 0]).all()
    threshold = script.calibrate(model, [part[:100] for part in data["calibration"]], 0.6)
    result = script.evaluate(model.skipping, [part[:100] for part in data["test"]], threshold)
    assert script.summary(model, result)["budget"] == pytest.approx(0.6, abs=0.05)
