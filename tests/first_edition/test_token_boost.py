"""Learners in order, each from its own prefix; gates that learn; labels; counts that cost what they run."""
import copy
import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import token_boost as script
from first_edition.conftest import build, inputs

DATASETS = ("shapes", "pydoc")


class Forced(nn.Module):
    """A gate that wants a given number of learners for every token, whatever it reads."""
    macs = 7

    def __init__(self, count, learners):
        super().__init__()
        self.logits = 50.0 * nn.functional.one_hot(count, learners + 1).double()        # (B, T, N + 1)

    def forward(self, x):
        return self.logits.view(*x.shape[:-1], -1)


def naive(block, x, k, learners):
    """The bias and the first k learners, one neuron after the other: x (C,) -> (C,)."""
    y = block.down.bias.clone()
    for j in range(k * len(block.up.bias) // learners):
        y += block.down.weight[:, j] * max(0.0, (block.up.weight[j] @ x + block.up.bias[j]).item())
    return y


@torch.no_grad()
@pytest.mark.parametrize("learners", (4, 8))
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_count_in_one_batch(dataset, learners):
    """All counts from 0 to N stand side by side, in every layer. Each token gets the sum of its first
    k learners; what its neighbours get, the most in the batch included, changes nothing."""
    model, x = build(script, dataset, learners=learners).double(), inputs(dataset, count=3)
    x = x.double() if x.is_floating_point() else x
    count = [torch.arange(3 * 64).view(3, 64) % (learners + 1), torch.arange(3 * 64).view(3, 64) // 7 %
             (learners + 1)]
    count[0][0] = 2                                             # an example without the largest count
    model.gates = nn.ModuleList(Forced(c, learners) for c in count)
    state = model.twin.embed(x)
    for block, c in zip(model.twin.blocks, count):
        state = block.attend(state)
        normed = block.norm2(state)
        state = state + torch.stack([naive(block, v, k, learners) for v, k in zip(
            normed.flatten(0, 1), c.flatten().tolist())]).view_as(state)
    expected = model.twin.readout(state)
    for run in (model.masked, model.skipping):
        logits, macs, token_macs = run(x, 0.5)
        assert torch.allclose(logits, expected, atol=1e-10, rtol=0)
        # by hand, C = 32: attention and gates of two layers, the head of a text, C / N neurons' worth
        fixed = 2 * (4 * 32 * 32 + 2 * 64 * 32 + 144 + 16 * (learners + 1) + 32 * 16 - 144
                     - 16 * (learners + 1)) + (128 * 32 if dataset == "pydoc" else 0)
        fixed += 2 * (model.gates[0].macs - 32 * 16)            # the stand-ins' price
        assert torch.equal(token_macs, fixed + sum(count) * 2 * 32 * (128 // learners))
        assert torch.equal(macs, token_macs.sum(1) + model.twin.example_macs)
    for i in range(3):
        model.gates = nn.ModuleList(Forced(c[i:i + 1], learners) for c in count)
        assert torch.allclose(model.skipping(x[i:i + 1], 0.5)[0], expected[i], atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_ends_are_the_twin_and_its_biases(dataset):
    model, x = build(script, dataset, "small"), inputs(dataset, count=3)
    gates = 4 * 64 * (16 * model.twin.width + 16 * 5)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, model.twin(x), atol=1e-4)
        assert macs.tolist() == [model.dense_macs + gates] * 3
        assert run(x, model.cheapest)[1].tolist() == [model.floor] * 3
    assert model.floor == model.dense_macs + gates - 4 * 64 * 8 * model.twin.width ** 2
    for block in model.twin.blocks:
        block.down.weight.zero_()
    assert torch.allclose(model.skipping(x, model.cheapest)[0], model.twin(x), atol=1e-4)


def test_sampling_by_hand():
    """At-least sums by hand; samples are one-hot, as frequent as softmax says, with the gradient of
    their relaxation; at the start 87 in 100 tokens run everything."""
    p = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4])
    assert script.at_least(p).tolist() == pytest.approx([0.9, 0.7, 0.7, 0.4])
    odds = [math.log(9), math.log(7 / 3), math.log(7 / 3), math.log(4 / 6)]
    assert script.log_odds(p.log() + 5).tolist() == pytest.approx(odds)
    torch.manual_seed(0)
    logits = p.log().expand(20000, 5).clone().requires_grad_()
    drawn = script.gumbel_softmax(logits, 0.8)
    assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(-1) == 1).all()
    assert drawn.mean(0).tolist() == pytest.approx(p.tolist(), abs=0.015)
    torch.manual_seed(1)
    drawn = script.gumbel_softmax(logits[:3], 0.8)
    gradient, = torch.autograd.grad(drawn[:, 3].sum(), logits)
    torch.manual_seed(1)
    noise = -torch.empty(3, 5).exponential_().log()
    soft = ((logits[:3] + noise) / 0.8).softmax(-1)
    assert torch.allclose(gradient[:3], torch.autograd.grad(soft[:, 3].sum(), logits)[0][:3])
    gate = script.Gate(32, 4)
    assert gate(torch.zeros(1, 32)).softmax(-1)[0, 4].item() == pytest.approx(0.87, abs=0.01)
    assert gate(torch.randn(9, 32)).softmax(-1)[:, 4].std() < 0.01


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_task_loss_reaches_the_gates(dataset):
    """Phase 3, cross-entropy alone, without the three terms: every parameter of every gate moves."""
    model, x = build(script, dataset).train(), inputs(dataset, count=16)
    logits, _ = model(x)
    y = torch.randint(logits.shape[-1], logits.shape[:-1])
    script.cross_entropy(logits, y).mean().backward()
    for name, parameter in model.gates.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 1e-8, name


def test_gates_learn_to_leave_out_a_learner_that_hurts():
    """Only the last learner of the last layer writes, and what it writes makes every answer wrong."""
    torch.manual_seed(0)
    model, x, y = build(script, "shapes"), inputs("shapes", count=16), torch.zeros(16).long()
    with torch.no_grad():
        for gate in model.gates:
            gate.out.weight.normal_(std=0.001)
            gate.out.bias.zero_()
        model.twin.blocks[1].down.weight.zero_()
        model.twin.head.weight.zero_()
        model.twin.head.weight[0, 0] = -1.0
        model.twin.blocks[1].down.weight[0, -32:] = 1.0
    total = torch.zeros(5)
    for _ in range(20):
        loss = script.cross_entropy(model(x)[0], y).mean()
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
    model = build(script).double()
    block, x, y = model.twin.blocks[0], torch.randn(2, 7, 32).double(), torch.randn(2, 7, 32).double()
    sums = script.prefixes(block, x, 4)
    assert sums.shape == (5, 2, 7, 32)
    assert torch.allclose(sums[n][0, 0], naive(block, x[0, 0], n, 4))
    parameters = block.up.weight, block.up.bias, block.down.weight, block.down.bias
    gradients = torch.autograd.grad((sums[n] - y).square().sum(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]
    rows = slice(32 * n - 32, 32 * n) if n else slice(0, 0)
    h = (x @ block.up.weight[rows].T + block.up.bias[rows]).relu()
    expected = [torch.zeros_like(p) for p in parameters]
    residual = 2 * (sums[n] - y).detach()
    back = residual @ block.down.weight[:, rows] * (h > 0)
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
    for factor, block in zip((1.0, 100.0), model.twin.blocks):
        block.down.weight.mul_(factor)
    for block, (_, y) in zip(model.twin.blocks, script.dense_mlps(model.twin, x)):
        assert y.shape == (8, 64, 32)
    teacher = copy.deepcopy(model.twin)
    for block, (_, y) in zip(model.twin.blocks, script.dense_mlps(teacher, x)):
        block.down.bias.copy_(y.mean((0, 1)))
    errors, seen = script.prefix_errors(model, teacher, x)
    assert errors.shape == (2, 5, 8, 64) and len(seen) == 2 and seen[1].shape == (8, 64, 32)
    assert errors[:, 0].mean((1, 2)).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    errors, _ = script.prefix_errors(build(script), build(script).twin, x)
    assert errors[:, 4].max() < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("dataset", DATASETS)
def test_sorting_neurons_changes_nothing_but_their_order(dataset):
    model, x = build(script, dataset), inputs(dataset)
    before, weight = model.twin(x), model.twin.blocks[1].up.weight.clone()
    script.sort_neurons(model.twin, x)
    assert torch.allclose(model.twin(x), before, atol=1e-5)
    assert not torch.equal(model.twin.blocks[1].up.weight, weight)
    assert torch.equal(model.twin.blocks[1].up.weight.sum(1).sort()[0], weight.sum(1).sort()[0])
    for block, (normed, _) in zip(model.twin.blocks, script.dense_mlps(model.twin, x)):
        importance = block.up(normed).relu().mean((0, 1)) * block.down.weight.norm(dim=0)
        assert (importance.diff() < 1e-6).all() and importance[0] > 2 * importance[-1]


def test_the_terms_by_hand():
    """Two examples, one layer, two learners: counts 2, 2 and 1, 0; so shares of 1 and 1/4."""
    model = build(script, learners=2)
    runs = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])[:, :, None]
    spent = model.spent(runs).item()
    assert spent == pytest.approx((model.floor + 0.625 * 2 * 64 * 8 * 32 * 32) / model.dense_macs)
    p = torch.tensor([0.25, 0.25, 0.5])
    entropy = -(p * p.log()).sum().item() / math.log(3)
    expected = 10 * (spent - 0.7) ** 2 - 0.05 * entropy - 0.1 * 0.75 / 2
    assert model.terms(runs).item() == pytest.approx(expected, abs=1e-5)
    for options in dict(dataset="pydoc"), dict(dataset="shapes", diversity=0.0):    # need not differ
        model = build(script, learners=2, **options)
        expected = 10 * (model.spent(runs).item() - 0.7) ** 2 - 0.05 * entropy
        assert model.terms(runs).item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def small_data():
    data = script.load_data(script.Config(dataset="shapes", size="tiny", device="cpu"))
    return data._replace(calibration=[part[:500] for part in data.calibration],
                         test=[part[:500] for part in data.test], difficulty=data.difficulty[:500])


def test_each_phase_trains_its_own_part(small_data):
    """Phase 1 moves the MLPs, phase 2 the gates; both get better at what they do; the rest stays."""
    torch.manual_seed(0)
    cfg = script.Config(dataset="shapes", size="tiny", device="cpu", steps=40, batch=64)
    model, moved = script.Model(cfg), {}
    for number, objective in enumerate((script.train_dense, script.distil, script.fit_gates)):
        if number:
            teacher = copy.deepcopy(model.twin).eval() if number == 1 else teacher
            objective = functools.partial(objective, teacher=teacher)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = script.network_input(small_data.calibration[0])
        y = small_data.calibration[1]
        first = objective(model, x, y)[0].item()
        script.train(model, small_data, cfg, objective)
        assert objective(model, x, y)[0].item() < (1.0, 0.7, 0.95)[number] * first
        moved[number] = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not [name for name in moved[0] if "gates" in name]
    assert moved[1] == {f"twin.blocks.{layer}.{part}.{kind}" for layer in range(2)
                        for part in ("up", "down") for kind in ("weight", "bias")}
    assert moved[2] == {name for name, _ in model.named_parameters() if name.startswith("gates")}


def test_controls_spend_the_same_without_looking(small_data):
    """As many learners as the gates ran: evenly, in every layer and for every token within one; at
    random, with the gates' frequencies of each layer."""
    model = build(script)
    count = np.random.default_rng(0).choice(5, p=(0.3, 0.3, 0.1, 0.1, 0.2), size=(500, 64, 2))
    count[:, :, 1] = np.minimum(count[:, :, 1], 2)
    asked = []
    run, model.run = model.run, lambda x, choose: asked.append(run(x, choose)) or asked[-1]
    for result in script.controls(model, small_data.test, 0.5, count, seed=0):
        spent = model.cost(torch.tensor(count).long().sum(2))[0].double().mean().item()
        assert result["macs"].mean() == pytest.approx(spent, rel=0.005)
    runs = torch.cat([chosen for _, chosen in asked]).view(2, 500, 64, 2, 4)
    assert (runs[..., 1:] <= runs[..., :-1]).all()                  # no learner without those before it
    even, chance = runs.sum(-1).numpy()
    assert set(np.unique(even)) == {1, 2} and even[..., 0].mean() == pytest.approx(even[..., 1].mean(),
                                                                                  abs=0.02)
    for layer in range(2):
        for k in range(5):
            assert (chance[..., layer] == k).mean() == pytest.approx((count[..., layer] == k).mean(),
                                                                     abs=0.01)
    assert abs(np.corrcoef(chance[..., 0].flatten(), count[..., 0].flatten())[0, 1]) < 0.02


def test_a_trained_model_boosts_and_meets_its_budget(small_data, run, tmp_path, monkeypatch):
    """The real command, all four phases: with every learner the error falls, in every layer; what the
    test split costs is the budget within 0.02; a fuller run is in the log."""
    monkeypatch.setattr(script, "load_data", lambda cfg: small_data)
    monkeypatch.setattr(script, "wall_clock", lambda *args: {f"{k}_ms_batch_{b}": 1.0 for b in (1, 256)
                                                             for k in ("dense", "skipping")})
    status, printed, errors = run("token_boost", "--dataset", "shapes", "--size", "tiny", "--device", "cpu",
                                  "--steps", "500", "--batch", "32", "--budget", "0.8", "--phases", "0123",
                                  cwd=tmp_path)
    assert status == 0, errors[-2000:]
    for name in ("phase 0: dense", "phase 1: distil", "phase 2: gates", "phase 3: by the task"):
        assert name in errors
    meta = json.loads(str(np.load(tmp_path / "logs/shapes-tiny/token_boost-s0.npz")["meta"]))
    learned = meta["learners"]
    error = np.array(learned["error"])
    assert error.shape == (2, 5) and (np.diff(error, axis=1) <= 0).all() and (error[:, 1] < 0.6).all()
    assert learned["error_against"] == "the dense MLP" and np.array(learned["error_after"])[:, 4].max() < 1e-6
    assert meta["at_budget"]["budget"] == pytest.approx(0.8, abs=0.02)
    for control in ("even", "random"):
        assert learned[control]["budget"] == pytest.approx(meta["at_budget"]["budget"], abs=0.02)
    histogram = np.array(learned["histogram"])                                      # (N + 1, L)
    assert histogram.shape == (5, 2) and histogram.sum(0).tolist() == pytest.approx([1, 1])
    assert (np.arange(5) @ histogram).tolist() == pytest.approx(learned["mean_count"])
    assert set(learned["seconds"]) == set("0123") and "mean learners by layer" in printed


def test_phases_share_the_steps(small_data, run, tmp_path, monkeypatch):
    """What is left out goes to the others: the total stays."""
    took = []

    def record(model, data, cfg, objective, name="train"):
        took.append((name, cfg.steps, cfg.epochs))
        return 0.0

    def stop(*args):
        raise script.UserError("trained")

    monkeypatch.setattr(script, "load_data", lambda cfg: small_data)
    monkeypatch.setattr(script, "train", record)
    monkeypatch.setattr(script, "calibrate", stop)
    for phases in ("0123", "3", "03"):
        took.clear()
        _, _, errors = run("token_boost", "--dataset", "shapes", "--size", "tiny", "--device", "cpu",
                           "--phases", phases, "--steps", "200", "--epochs", "2", cwd=tmp_path)
        assert errors.endswith("trained\n")
        assert [name[6] for name, _, _ in took] == list(phases)
        assert sum(steps for _, steps, _ in took) == 200
        assert sum(epochs for _, _, epochs in took) == pytest.approx(2.0)


@pytest.mark.parametrize("options, message", (
    (("--learners", "7"), "does not divide the 128"), (("--learners", "0"), "does not divide"),
    (("--phases", "10"), "no selection"), (("--phases", ""), "no selection"), (("--phases", "04"), "no sel"),
    (("--diversity", "-1"), "not negative"), (("--diversity", "nan"), "must be finite"),
    (("--budget", "0.3"), "without learners it is 0.6"), (("--budget", "1.1"), "1 is the most")))
def test_bad_options_are_one_line(options, message, run, tmp_path, monkeypatch):
    def train(*args):
        raise AssertionError("trained before it was checked")
    monkeypatch.setattr(script, "train", train)
    status, _, errors = run("token_boost", "--dataset", "shapes", "--size", "tiny", *options, cwd=tmp_path)
    assert status == 2 and message in errors.splitlines()[-1]
