"""The trick, the gates at three grains, and what they are told about the budget."""
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gumbel_gates as script
from first_edition.conftest import build, inputs, thresholds
from test_contract import executed_macs

CASES = [(grain, dataset) for grain in ("layer", "token", "head") for dataset in ("shapes", "pydoc")]
cases = pytest.mark.parametrize("grain, dataset", CASES)


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
        mean = script.sample(z.expand(40000, 5), estimator).mean(0)
        assert torch.allclose(mean, z.sigmoid(), atol=0.012)
    assert script.sample(z, "sigmoid_st").tolist() == [0, 0, 0, 1, 1]


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
    script.sample(z, "gumbel").sum().backward()
    torch.manual_seed(5)
    noise = -torch.empty(2, 2).exponential_().log()
    p = (z.detach() + noise[:, 0] - noise[:, 1]).sigmoid()          # logistic noise on z
    assert torch.allclose(z.grad, p * (1 - p), atol=1e-6)
    z.grad = None
    script.sample(z, "sigmoid_st").sum().backward()
    assert torch.allclose(z.grad, z.detach().sigmoid() * (1 - z.detach().sigmoid()))


def test_reinforce_agrees_with_the_exact_gradient():
    """Three gates, eight outcomes, all summed, against 200,000 samples; with and without baseline."""
    z = torch.tensor([[0.4, -0.7, 1.1]], dtype=torch.float64, requires_grad=True)
    reward = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    p = torch.where(outcomes > 0, z.sigmoid(), 1 - z.sigmoid()).prod(1)                 # (8,)
    exact, = torch.autograd.grad(-(p * reward).sum(), z)

    torch.manual_seed(1)
    many = z.expand(200000, 3)
    gates = script.sample(many, "reinforce")
    got = reward[(gates * torch.tensor([4, 2, 1])).sum(1).long()]
    for baseline in (0.0, reward[5]):
        loss = script.score_function(many, gates, got - baseline)
        estimate, = torch.autograd.grad(loss, z, retain_graph=True)
        assert torch.allclose(estimate, exact, atol=0.01) and exact.abs().max() > 0.05


def test_reinforce_weighs_the_task_as_the_mean_loss_does():
    """64 copies of an image, 56 of them sampled: every outcome is run once, and counts as often as it
    was drawn, against the greedy gates."""
    model, y = build(script, "shapes", estimator="reinforce").double(), torch.full((64,), 3)
    for gate in model.gates:
        torch.nn.init.constant_(gate.out.bias, 0.5)
    x, parameters = inputs("shapes", count=1).double().expand(64, -1, -1, -1), list(model.gates.parameters())
    torch.manual_seed(0)
    loss, _, _, gates = script.surrogate(model, x, y, "reinforce", budget_weight=0)
    got = torch.autograd.grad(loss, parameters)
    drawn, counts = gates.unique(dim=0, return_counts=True)                             # (n, L, 1, U)
    assert counts.sum() == 56 and len(drawn) > 5
    greedy, total = script.cross_entropy(model.masked(x[:1], 0.0)[0], y[:1]), 0
    for outcome, count in zip(drawn, counts):
        logits, z, _ = model.everything(x[:1], lambda layer, z: outcome[layer][None])
        log_p = torch.where(outcome > 0, F.logsigmoid(z), F.logsigmoid(-z)).sum()
        total = total + count / 64 * (script.cross_entropy(logits, y[:1]) - greedy).detach() * log_p
    for a, b in zip(got, torch.autograd.grad(total, parameters)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6) and b.abs().max() > 0


def test_an_attention_is_the_sum_of_its_heads():
    attention, x = build(script, "pydoc", "small").twin.blocks[0].attention, torch.randn(2, 9, 128)
    heads = [script.one_head(attention, i) for i in range(4)]
    total = sum(h.out(h.mix(h.query(x), h.key_value(x))) for h in heads)
    assert torch.allclose(total, attention(x), atol=1e-5)


def test_ragged_attention_against_a_mask():
    """Those who ask get what full attention gives them when the unkeyed are masked."""
    torch.manual_seed(0)
    model = build(script, "pydoc", "small")
    attention, past = model.twin.blocks[0].attention, model.twin.blocks[0].past
    x, asks, keyed = torch.randn(5, 64, 128), torch.rand(5, 64) < 0.4, torch.rand(5, 64) < 0.5
    asks[3] = False                                                             # nobody asks here
    keyed = keyed | asks
    for heard in keyed, torch.ones_like(keyed):
        for limit in None, past:
            allowed = heard[:, None, None] if limit is None else heard[:, None, None] & limit
            found = script.ragged_attention(attention, x, asks, heard, limit)
            assert torch.allclose(found, attention(x, allowed)[asks], atol=1e-5)


@cases
def test_all_open_is_the_static_network(grain, dataset):
    model, x = build(script, dataset, "small", grain=grain), inputs(dataset, count=3)
    with torch.no_grad():
        dense = model.twin(x)
    rows = 64 if grain == "token" or dataset == "pydoc" else 1
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, dense, atol=1e-4)
        assert macs.tolist() == [model.dense_macs + 4 * rows * model.gates[0].macs] * 3


@cases
def test_all_closed_is_stem_and_head(grain, dataset):
    """Nothing is added to what was embedded; in a text keys and values are paid for all the same."""
    model, x = build(script, dataset, "small", grain=grain), inputs(dataset, count=3)
    with torch.no_grad():
        bare = model.twin.readout(model.twin.embed(x))
    rows = 64 if grain == "token" or dataset == "pydoc" else 1
    fixed = (64 * (128 * 128 + 4 * 2 * 128 * 128) if dataset == "pydoc" else
             256 * (27 * 32 + 9 * 32 + 32 * 32) + 64 * (9 * 32 * 64 + 9 * 64 + 64 * 64) + 640)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.cheapest)
        assert torch.allclose(logits, bare, atol=1e-4)
        assert macs.tolist() == [fixed + 4 * rows * model.gates[0].macs] * 3


@cases
def test_macs_are_what_ran_at_every_grain(grain, dataset):
    model, x = build(script, dataset, "small", grain=grain), inputs(dataset, count=3)
    seen = set()
    for threshold in thresholds(model, x):
        for i in range(len(x)):
            executed, (_, macs, token_macs) = executed_macs(model.skipping, x[i:i + 1], threshold)
            assert executed == macs.item() and token_macs.sum() <= macs
            seen.add(macs.item())
    assert len(seen) > 3


@cases
def test_masked_skipping_batch_and_noise_at_every_grain(grain, dataset):
    model, x = build(script, dataset, grain=grain).double(), inputs(dataset, count=64)
    x = x.double() if x.is_floating_point() else x
    for threshold in thresholds(model, x, (0.3, 0.7)):
        masked, skipping = model.masked(x, threshold), model.skipping(x, threshold)
        again, part = model.skipping(x, threshold), model.skipping(x[20:21], threshold)
        for a, b, c, d in zip(masked, skipping, again, part):
            assert torch.allclose(a.double(), b.double(), atol=1e-9, rtol=0) and torch.equal(b, c)
            assert torch.allclose(b[20:21].double(), d.double(), atol=1e-9, rtol=0)
        assert len(masked[1].unique()) > 1                                      # mixed, not all alike


@pytest.mark.parametrize("grain", ("layer", "token", "head"))
def test_no_grain_looks_ahead(grain):
    model, x = build(script, "pydoc", grain=grain).double(), inputs("pydoc", count=8)
    for threshold in thresholds(model, x, (0.3, 0.7)):
        changed = x.clone()
        changed[:, 30:] = (changed[:, 30:] - 32 + 41) % 95 + 32
        (logits, _, macs), (other, _, other_macs) = (model.skipping(v, threshold) for v in (x, changed))
        assert torch.allclose(logits[:, :30], other[:, :30], atol=1e-10)
        assert torch.equal(macs[:, :30], other_macs[:, :30])
        assert not torch.equal(macs[:, 30:], other_macs[:, 30:])


@pytest.mark.parametrize("estimator", ("gumbel", "sigmoid_st", "reinforce"))
@cases
def test_the_task_alone_moves_every_gate(grain, dataset, estimator):
    model, x = build(script, dataset, grain=grain, estimator=estimator), inputs(dataset, count=32)
    torch.manual_seed(0)
    y = torch.randint(10, (32, 64) if dataset == "pydoc" else (32,))
    loss = script.surrogate(model, x, y, estimator, budget_weight=0)[0]
    for gradient in torch.autograd.grad(loss, [gate.out.bias for gate in model.gates]):
        assert (gradient != 0).all()                                            # of every unit


@pytest.mark.parametrize("estimator", ("gumbel", "sigmoid_st", "reinforce"))
def test_an_eighth_of_the_batch_runs_everything(estimator):
    """With gates that never open by themselves: two of sixteen are the twin, and the budget term and
    what REINFORCE compares are about the others, which here are what the greedy gates make."""
    model, x = build(script, "shapes", estimator=estimator), inputs("shapes", count=16)
    for gate in model.gates:
        torch.nn.init.constant_(gate.out.bias, -1000.0)
    with torch.no_grad():
        logits, aux = model(x)
        assert torch.allclose(logits[:2], model.twin(x)[:2], atol=1e-5)
        assert torch.allclose(logits[2:], model.masked(x[2:], 0.0)[0], atol=1e-5)
        assert aux.item() == pytest.approx(10 * model.target ** 2)
        loss, _, each, gates = script.surrogate(model, x, torch.arange(16) % 10, estimator, 1.0)
        assert len(gates) == 14 and not gates.any()
        assert loss.item() == pytest.approx(each.mean().item() + model.target ** 2, abs=1e-5)


def test_the_budget_is_for_the_batch_not_for_the_example():
    """Half of the examples open, half closed spends the same as all half open, and costs nothing."""
    model = build(script, "shapes", "small", budget=0.6)
    open_, closed = torch.ones(2, 4, 1, 2), torch.zeros(2, 4, 1, 2)
    uneven = torch.cat([open_, closed])
    assert torch.allclose(model.excess(uneven), torch.full((4,), 0.5 - model.target))
    assert torch.allclose(model.excess(uneven), model.excess(uneven * 0 + 0.5))
    spent = model.fixed + model.used(open_).sum(1) * sum(model.parts(64)[1])
    assert spent.tolist() == model.cost(open_ > 0)[0].tolist() == [
        model.dense_macs + 4 * model.gates[0].macs] * 2
    blockwise = torch.stack([open_[:, 0], closed[:, 0]] * 2, 1)      # blocks 1, 3 open; 2, 4 closed
    assert torch.allclose(model.excess(blockwise), torch.full((4,), 0.5 - model.target))
    model.per_layer = True
    expected = torch.tensor([1.0, 0, 1, 0]) - model.target
    assert torch.allclose(model.excess(blockwise), expected)


@pytest.mark.parametrize("budget", (0.5, 0.75))
def test_the_budget_is_met(budget, run, shorten, tmp_path, monkeypatch):
    shorten(script, 400)
    monkeypatch.setattr(script, "gradient_noise", lambda *arguments: {})
    status, _, errors = run("gumbel_gates", "--dataset", "shapes", "--size", "tiny", "--steps", "150",
                            "--batch", "64", "--device", "cpu", "--budget", str(budget), cwd=tmp_path)
    assert status == 0, errors[-2000:]
    log = np.load(tmp_path / "logs/shapes-tiny/gumbel_gates-s0.npz")
    meta = json.loads(str(log["meta"]))
    assert meta["at_budget"]["budget"] == pytest.approx(budget, abs=0.02)
    assert meta["gates"]["budget_at_zero"] == pytest.approx(budget, abs=0.2)    # trained for it


def test_mutual_information_by_hand():
    """A gate that is the class, one that ignores it, and one that is open for 3/4 and 1/4."""
    label = np.repeat([0, 1], 8)
    gates = np.stack([label == 1, np.arange(16) % 2 == 0,
                      np.r_[np.arange(8) < 6, np.arange(8) < 2]], 1)
    h = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert script.mutual_information(gates, label) == pytest.approx([1.0, 0.0, 1 - h])


def test_random_gates_are_open_as_often():
    model, x = build(script, "shapes", "small"), inputs("shapes", count=512)
    rates = np.array([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.0, 1.0]])
    logits, macs, _ = script.random_gates(model, rates, 0)(x, None)
    unit = np.array(model.parts(64)[1])
    assert macs.double().mean().item() == pytest.approx(model.fixed + (rates * unit).sum(), rel=0.02)
    assert len(macs.unique()) == 9      # 0, 1 or 2 attentions, and 0, 1 or 2 MLPs, left to chance


def test_gate_gradients_are_noisy_in_the_known_order(monkeypatch):
    """Straight-through sigmoid has no noise at all, REINFORCE more than the trick; and a known one: the
    length of a mean of 30 is not that of the mean."""
    torch.manual_seed(0)
    model = build(script, "shapes")
    x = torch.randint(256, (64, 3, 32, 32)).byte()
    noise = script.gradient_noise(model, x, torch.randint(10, (64,)))
    assert noise["sigmoid_st"] < 1e-3 and noise["sigmoid_st"] < noise["gumbel"]
    assert not noise["reinforce"] < noise["gumbel"]                             # it may be NaN

    def surrogate(model, *_, **__):     # every gradient has mean 1 and standard deviation 3
        return [sum((p * (1 + 3 * torch.randn_like(p))).sum() for p in model.gates.parameters())]

    monkeypatch.setattr(script, "surrogate", surrogate)
    model = build(script, "shapes", "small")            # some 4,300 parameters
    known = script.gradient_noise(model, x, torch.zeros(64))
    assert known == pytest.approx(dict.fromkeys(known, 3.0), rel=0.05)
