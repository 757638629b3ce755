"""When to leave, what leaving costs, and that the guarantee holds."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import early_exit as script
from conftest import build, configure, inputs
from results import bound
from test_contract import executed_macs

KINDS = (("--criterion", "margin"), ("--criterion", "gain"), ("--loss", "branching"))

def test_certainty_by_hand():
    """Over classes, the last axis: p = (1/2, 1/4, 1/4) and its permutations, and both extremes."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]).log()
    for criterion, expected, least in (("confidence", 0.5, 0.1), ("margin", 0.25, 0.0),
                                       ("entropy", 1 - 1.5 / math.log2(3), 0.0)):
        sure = script.certainty(logits, criterion)
        assert sure.shape == (1, 2) and sure.flatten().tolist() == pytest.approx([expected] * 2)
        flat, peak = torch.zeros(4, 10), torch.eye(10) * 1000
        assert script.certainty(flat, criterion).tolist() == pytest.approx([least] * 4, abs=1e-6)
        assert script.certainty(peak, criterion).tolist() == pytest.approx([1.0] * 10)
        assert script.Model.cheapest < script.certainty(flat, criterion).min()
        assert script.certainty(peak, criterion).max() < script.Model.full
    with pytest.raises(KeyError):
        script.certainty(logits, "Confidence")

def test_exit_weights_follow_the_recursion():
    """f_l = g_l head_l + (1 - g_l) f_(l+1), worked backwards, equals the weighted sum."""
    torch.manual_seed(0)
    gate, heads = torch.rand(3, 5), torch.rand(4, 5)
    f = heads[3]
    for g, head in zip(gate.flip(0), heads[:3].flip(0)):
        f = g * head + (1 - g) * f
    weight = script.exit_weights(gate)
    assert torch.allclose((weight * heads).sum(0), f) and torch.allclose(weight.sum(0), torch.ones(5))

def test_the_branching_loss_by_hand(dataset):
    """One cross-entropy on the mixture of probabilities, the last head's own, and the expected MACs."""
    model, x = build(script, dataset, "tiny", "--loss", "branching", "--budget", "0.6"), inputs(dataset)
    y = torch.randint(10, (8, 64) if dataset == "pydoc" else (8,))
    with torch.no_grad():
        loss, shown = model.loss(x, y, 0.5)
        logits, gate, _ = model.all_exits(x)
    g = gate[0]
    f = g[..., None] * logits[0].softmax(-1) + (1 - g[..., None]) * logits[1].softmax(-1)
    task = -f.gather(-1, y[..., None]).log().mean()
    macs = (g.mean() * model.exit_macs[0] + (1 - g.mean()) * model.exit_macs[1]) / model.net.macs
    plain = torch.nn.functional.cross_entropy(logits[1].movedim(-1, 1), y)
    assert loss.item() == pytest.approx((plain + task + 10 * (macs - 0.6) ** 2).item(), rel=1e-4)
    assert shown["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert shown["macs"].item() == pytest.approx(macs.item())

def test_gates_learn_what_the_rest_would_save(dataset):
    """Their loss by hand: the squared error of the predicted saving; blocks and heads do not feel it."""
    model, x = build(script, dataset, "tiny", "--criterion", "gain", "--regime", "joint"), inputs(dataset)
    y = torch.randint(10, (8, 64) if dataset == "pydoc" else (8,))
    each = [torch.nn.functional.cross_entropy(z.movedim(-1, 1), y, reduction="none")
            for z in model.all_exits(x)[0]]
    state = model.net.blocks[0](model.net.embed(x))
    saving, weight = -model.gates[0](state)[..., 0], model.early
    plain = (each[1].mean() + weight * each[0].mean()) / (1 + weight)
    expected = plain + 0.1 * (saving - each[0] + each[1]).square().mean()
    loss = model.loss(x, y, 0.5)[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    parameters = [model.net.blocks[0].mlp[0].weight, *model.heads.parameters()]
    for got, by_hand in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters)):
        assert torch.allclose(got, by_hand, atol=1e-6)

def prices(dataset, kind, width=32):
    """MACs of a head, of a gate (0 where there is none), and of the last head, by hand."""
    features, K = (width, 128) if dataset == "pydoc" else (16 * width, 10)
    head = width * K if dataset == "pydoc" else features * 64 + 64 * K
    return head, (features * 16 + 16) * ("margin" not in kind), width * K

@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
@pytest.mark.parametrize("dataset, body", (
    # by hand: stem and one block; on text all convolutions and one MLP
    ("shapes", 256 * 27 * 16 + 64 * (9 * 16 * 32 + 9 * 32 + 8 * 32 * 32)),
    ("pydoc", 64 * (4 * 8 * 32 + 8 * 32 * 32))))
def test_the_ends(dataset, body, kind):
    """All leave at the first head; or none early: the static answer, its MACs and early heads or gates."""
    model, x = build(script, dataset, "tiny", "--depth", "4", *kind), inputs(dataset, count=3)
    (head, gate, _), count = prices(dataset, kind), 64 if dataset == "pydoc" else 1
    first = model.heads[0](model.net.blocks[0](model.net.embed(x)))
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.cheapest)
        assert torch.allclose(logits, first, atol=1e-4)
        assert macs.tolist() == [body + (head + gate) * count] * 3 == [model.exit_macs[0]] * 3
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, model.net(x), atol=1e-4)
        assert macs.tolist() == [model.net.macs + 3 * (gate or head) * count] * 3

@torch.no_grad()
def spread_exits(model, x):
    """Scale each early head, or shift its gate, until a third of what it sees is surer than 1/2."""
    x = model.net.embed(x)
    for layer, block in enumerate(model.net.blocks[:-1]):
        x = block(x)
        if model.gates:
            model.gates[layer].out[2].bias -= torch.logit(model.sure(layer, x)).quantile(2 / 3)
            continue
        last = model.heads[layer].out[-1]
        for _ in range(60):
            factor = 1.15 if model.sure(layer, x, model.heads[layer](x)).quantile(2 / 3) < 0.5 else 1 / 1.1
            last.weight *= factor
            last.bias *= factor

@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_leaving_at_every_depth_in_one_batch(dataset, kind):
    """Some leave at each of four exits; each answer is that of the head it left by, at its price."""
    model = build(script, dataset, "tiny", "--depth", "4", *kind).double()
    x = inputs(dataset, count=64, dtype=torch.float64)
    spread_exits(model, x)
    masked, decisions = model.dense(x, 0.5)
    depth = decisions.sum(0).long()
    assert set(depth.unique().tolist()) == {1, 2, 3, 4}
    assert (decisions[1:] <= decisions[:-1]).all()                      # who left is gone
    logits, macs, token_macs = model.skipping(x, 0.5)
    assert torch.allclose(logits, masked, atol=1e-9)
    with torch.no_grad():
        for i in range(4):                                              # the MACs are those that torch sees
            assert executed_macs(model.skipping, x[i:i + 1], 0.5)[0] == macs[i]
    exits, sure, _ = model.all_exits(x, 0.5)
    assert ((sure >= 0.5).int().argmax(0)[depth < 4] == depth[depth < 4] - 1).all()
    if dataset == "shapes":                                             # images: exits of the plain pass
        chosen = model.all_exits(x)[0][depth - 1, torch.arange(64)]
        assert torch.allclose(logits, chosen, atol=1e-9)
        assert macs.tolist() == [model.exit_macs[d - 1] for d in depth]
    else:
        head, gate, last = prices(dataset, kind)
        way = {1: head, 2: 2 * head, 3: 3 * head, 4: 3 * head + last}
        if gate:
            way = {1: gate + head, 2: 2 * gate + head, 3: 3 * gate + head, 4: 3 * gate + last}
        body = 4 * 8 * 32 + depth * 8 * 32 * 32
        assert (token_macs.sum(1) == macs).all()
        assert (token_macs - body == depth.clone().apply_(way.get)).all()

def test_a_head_sees_where_things_are():
    """It averages 2 x 2 neighbours: tokens can change places inside a square, not between squares."""
    head = script.Readout(32, [64, 10], True)
    x = torch.randn(5, 8, 8, 32)
    swapped, moved = x.clone(), x.clone()
    swapped[:, 2, 4], swapped[:, 3, 5] = x[:, 3, 5], x[:, 2, 4]
    moved[:, 2, 4], moved[:, 2, 6] = x[:, 2, 6], x[:, 2, 4]
    logits, same, other = (head(each.flatten(1, 2)) for each in (x, swapped, moved))
    assert torch.allclose(logits, same, atol=1e-6) and not torch.allclose(logits, other, atol=1e-4)
    by_hand = head.norm(x.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)))       # (5, 4, 4, 32)
    assert torch.allclose(logits, head.out(by_hand.flatten(1)), atol=1e-6)

@pytest.mark.parametrize("regime, progress, teach", (
    ("joint", 0.0, True), ("mixed", 0.59, False), ("mixed", 0.6, True), ("frozen", 0.99, False)))
@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_who_trains_the_blocks(regime, progress, teach, kind):
    """Apart, blocks get the gradient of the last head alone, and the early heads learn all the same."""
    model = build(script, "shapes", "tiny", "--regime", regime, *kind)
    x, y = inputs("shapes"), torch.randint(10, (8,))
    model.loss(x, y, progress)[0].backward()
    got = model.net.blocks[0].mlp[0].weight.grad.clone()
    assert all(p.grad.abs().sum() > 0 for p in (*model.heads.parameters(), *model.gates.parameters()))
    if "branching" not in kind:                 # which weighs the last head's answers with early gates
        model.zero_grad()
        torch.nn.functional.cross_entropy(model.net(x), y).backward()
        alone = model.net.blocks[0].mlp[0].weight.grad / (1 + model.early)
        assert torch.allclose(got, alone, atol=1e-6) != teach

def certify(monkeypatch, lost, risk):
    """How many thresholds pass, of which the first, second, ... lose these answers (N,)."""
    tried = iter([np.ones_like(lost[0]), *(~each for each in lost)])
    model = SimpleNamespace(full=1.01, masked=None)
    monkeypatch.setattr(script, "evaluate", lambda *args: dict(correct=next(tried)))
    passed = script.certified_threshold(model, None, risk)
    return 0 if passed == model.full else 1 + round(50 * (1 - passed) ** 0.5)

def test_learn_then_test_stops_before_the_first_failure(monkeypatch):
    """n = 5000 at 95 %: a mean of 0 certifies a risk of sqrt(ln 20 / 10000) = 0.017308 and no less.
    The walk does not resume behind a failure."""
    zero = np.zeros((51, 5000), bool)
    assert certify(monkeypatch, zero, 0.01731) == 51 and certify(monkeypatch, zero, 0.01730) == 0
    # risk 0.05 leaves room for means up to 0.05 - 0.017308 = 0.032692
    losses = [np.arange(5000) < mean * 5000 for mean in (0.0, 0.01, 0.0326, 0.0328, 0.0, 0.0)]
    assert certify(monkeypatch, losses, 0.05) == 3
    assert certify(monkeypatch, losses[3:], 0.05) == 0
    windows = [each.reshape(50, 100) for each in losses]        # of a text: 50 examples certify little
    assert certify(monkeypatch, windows, 0.05) == 0 and certify(monkeypatch, windows, 0.2058) == 3

def test_the_guarantee_holds_in_simulation(monkeypatch):
    """2,000 sets of 500; the true risk rises past 0.1: at most 5 % choose wrong, and choices are bold."""
    rng, true = np.random.default_rng(0), np.linspace(0.0, 0.2, 51)
    chosen = []
    for _ in range(2000):
        draws = rng.random(500)                               # one example's losses are coupled
        chosen.append(certify(monkeypatch, [draws < risk for risk in true], 0.1) - 1)
    assert np.mean([true[index] > 0.1 for index in chosen]) <= 0.05
    assert np.median(true[chosen]) > 0.03                     # not safe merely by never leaving
    naive = np.mean([true[max(i for i, r in enumerate(true) if (rng.random(500) < r).mean() <= 0.1)]
                     > 0.1 for _ in range(200)])
    assert naive > 0.2                                        # a rule without slack would be seen

def test_branching_takes_no_criterion(capsys):
    assert configure(script, "shapes", "tiny", "--loss", "branching").criterion == "gain"
    with pytest.raises(SystemExit):
        configure(script, "shapes", "tiny", "--loss", "branching", "--criterion", "entropy")
    assert "leave --criterion out" in capsys.readouterr().err

def test_the_bound_by_hand(tmp_path):
    """By its own exits a network is right where any head is; MACs are those of the first that is."""
    model, cfg = build(script, "shapes", "tiny", "--depth", "3"), configure(script, "shapes", "tiny", "--depth", "3")
    options = {key: value for key, value in vars(cfg).items() if key not in ("data", "out", "load", "device")}
    torch.save(dict(options=options, state_dict=model.state_dict()), tmp_path / "a.pt")
    x, y = script.load_data(cfg)["test"]
    with torch.no_grad():
        right = torch.cat([model.all_exits(some)[0].argmax(-1) for some in x.split(500)], 1) == y
    spent = torch.where(right[0], model.exit_macs[0], torch.where(right[1], model.exit_macs[1], model.exit_macs[2]))
    said = bound(str(tmp_path / "a.pt"), str(tmp_path / "a.pt"))
    assert said == (f"accuracy {right.any(0).float().mean():.4f} at {spent.double().mean() / model.net.macs:.3f} "
                    f"of the MACs; of the last exit {right[2].float().mean():.4f}")

def test_certified_threshold_on_a_model():
    model = build(script)
    split = [part[:300] for part in script.load_data(configure(script))["calibration"]]
    assert script.certified_threshold(model, split, 0.07) == model.full     # 300 certify 0.071 at best
    assert script.certified_threshold(model, split, 0.95) == 0.0            # all leave at the first

def test_the_control_deals_decisions_of_others(monkeypatch):
    """Equal MACs, in the mean; each example has those of another, at all layers alike."""
    results, evaluate = [], script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *args: results.append(evaluate(*args)) or results[-1])
    model = build(script, "shapes", "tiny", "--depth", "4")
    data = script.load_data(configure(script))
    spread_exits(model, data["test"][0][:64])
    split = [part[:250] for part in data["test"]]
    script.sweep_budgets(model, dict(calibration=split, test=split))
    own, dealt = results[-4:-2]                         # the last budget below the full model
    assert (own["macs"][::-1] == dealt["macs"]).all() and len(np.unique(own["macs"])) >= 3
    exits = model.all_exits(split[0])[0]
    depth = np.searchsorted(model.exit_macs.numpy(), dealt["macs"])
    assert (dealt["prediction"] == exits.argmax(-1)[depth, torch.arange(250)].numpy()).mean() > 0.98
