"""When to leave, what leaving costs, and that the guarantee holds."""
import math

import numpy as np
import pytest
import torch

import early_exit as script
from conftest import build, configure, inputs

DATASETS = ("shapes", "pydoc")
LOSSES = ("sum", "branching")


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


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_branching_loss_by_hand(dataset):
    """One cross-entropy on the mixture of probabilities, and the expected MACs."""
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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_nobody_leaves_early_above_every_certainty(dataset, loss):
    """The static network's answer, at its MACs and those of the early heads."""
    model, x = build(script, dataset, "tiny", "--depth", "4", "--loss", loss), inputs(dataset, count=3)
    static = model.net(x)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, static, atol=1e-4)
        features = 32 if dataset == "pydoc" else 16 * 32
        heads = 3 * features * (model.net.out.out_features + (loss == "branching"))
        assert macs.tolist() == [model.net.macs + heads * (64 if dataset == "pydoc" else 1)] * 3


@pytest.mark.parametrize("dataset, expected", (
    # by hand: stem, one block, one head; on text all convolutions, one MLP, one head
    ("shapes", 256 * 27 * 16 + 64 * (9 * 16 * 32 + 9 * 32 + 8 * 32 * 32) + 16 * 320),
    ("pydoc", 64 * (4 * 8 * 32 + 8 * 32 * 32 + 128 * 32))))
def test_everything_leaves_at_the_first_head(dataset, expected):
    model, x = build(script, dataset, "tiny", "--depth", "4"), inputs(dataset, count=3)
    logits, macs, _ = model.skipping(x, model.cheapest)
    assert macs.tolist() == [expected] * 3 == [model.exit_macs[0]] * 3
    first, _ = model.heads[0](model.net.blocks[0](model.net.embed(x)))
    assert torch.allclose(logits, first, atol=1e-4)


@torch.no_grad()
def spread_exits(model, x):
    """Scale each early head, or shift its gate, until a third of what it sees is surer than 1/2."""
    x = model.net.embed(x)
    for block, head in zip(model.net.blocks, model.heads):
        x = block(x)
        if head.gate:
            head.gate.bias -= torch.logit(head(x)[1]).quantile(2 / 3)
            continue
        for _ in range(60):
            factor = 1.15 if head(x)[1].quantile(2 / 3) < 0.5 else 1 / 1.1
            head.out.weight *= factor
            head.out.bias *= factor


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_leaving_at_every_depth_in_one_batch(dataset, loss):
    """Some leave at each of four exits; each answer is that of the head it left by, at its price."""
    model = build(script, dataset, "tiny", "--depth", "4", "--loss", loss).double()
    x = inputs(dataset, count=64)
    x = x.double() if x.is_floating_point() else x
    spread_exits(model, x)
    masked, decisions = model.dense(x, 0.5)
    depth = decisions.sum(0).long()
    assert set(depth.unique().tolist()) == {1, 2, 3, 4}
    assert (decisions[1:] <= decisions[:-1]).all()                      # who left is gone
    logits, macs, token_macs = model.skipping(x, 0.5)
    assert torch.allclose(logits, masked, atol=1e-9)
    exits, sure, _ = model.all_exits(x, 0.5)
    assert ((sure[:-1] >= 0.5).int().argmax(0)[depth < 4] == depth[depth < 4] - 1).all()
    if dataset == "shapes":                                             # images: exits of the plain pass
        chosen = model.all_exits(x)[0][depth - 1, torch.arange(64)]
        assert torch.allclose(logits, chosen, atol=1e-9)
        assert macs.tolist() == [model.exit_macs[d - 1] for d in depth]
    else:
        assert (token_macs.sum(1) == macs).all()
        assert (token_macs - token_macs.min() == (depth - 1) * (8 * 32 * 32) + (depth - 1).clamp_max(2)
                * model.heads[0].macs + (depth == 4) * model.net.head_macs).all()


def test_leaving_together_is_an_exit_of_its_own():
    model, x = build(script, "pydoc", "tiny", "--depth", "3"), inputs("pydoc")
    for last in (1, 2, 3):
        logits, macs, _ = model.leaving_at(x, last)
        assert torch.equal(logits, model.all_exits(x)[0][last - 1])
        assert (macs == model.exit_macs[last - 1]).all()


def test_a_head_sees_where_things_are():
    """It averages 2 x 2 neighbours: moving tokens inside a square changes nothing, between squares it
    changes the answer."""
    head = script.ExitHead(32, 10, True, "confidence")
    x = torch.randn(5, 8, 8, 32)
    swapped, moved = x.clone(), x.clone()
    swapped[:, 2, 4], swapped[:, 3, 5] = x[:, 3, 5], x[:, 2, 4]
    moved[:, 2, 4], moved[:, 2, 6] = x[:, 2, 6], x[:, 2, 4]
    logits, same, other = (head(each.flatten(1, 2))[0] for each in (x, swapped, moved))
    assert torch.allclose(logits, same, atol=1e-6) and not torch.allclose(logits, other, atol=1e-3)
    by_hand = head.norm(x).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))   # (5, 4, 4, 32)
    weight = head.out.weight.unflatten(1, (32, 4, 4))
    assert torch.allclose(logits, torch.einsum("nrcw,kwrc->nk", by_hand, weight) + head.out.bias, atol=1e-5)


@pytest.mark.parametrize("regime, progress, teach", (
    ("joint", 0.0, True), ("mixed", 0.59, False), ("mixed", 0.6, True), ("frozen", 0.99, False)))
@pytest.mark.parametrize("loss", LOSSES)
def test_who_trains_the_blocks(regime, progress, teach, loss):
    """Apart, blocks get the gradient of the last head alone, and the early heads learn all the same."""
    model = build(script, "shapes", "tiny", "--regime", regime, "--loss", loss)
    x, y = inputs("shapes"), torch.randint(10, (8,))
    model.loss(x, y, progress)[0].backward()
    got = model.net.blocks[0].mlp[0].weight.grad.clone()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.heads.parameters())
    if loss == "sum":
        model.zero_grad()
        torch.nn.functional.cross_entropy(model.net(x), y).backward()
        assert torch.allclose(got, model.net.blocks[0].mlp[0].weight.grad, atol=1e-6) != teach


def test_all_heads_train():
    """By both losses, every exit: below the nats of chance."""
    for loss in LOSSES:
        torch.manual_seed(0)
        cfg = configure(script, "pydoc", "tiny", "--steps", "60", "--loss", loss)
        data, model = script.load_data(cfg), script.Model(cfg)
        few = [part[:50] for part in data["test"]]
        before = [script.evaluate(model.leaving_at, few, last)["loss"].mean() for last in (1, 2)]
        script.train(model, data, cfg)
        after = [script.evaluate(model.leaving_at, few, last)["loss"].mean() for last in (1, 2)]
        assert max(after) < 4.3 < min(before)                           # the logarithm of 128 is 4.85


def test_learn_then_test_stops_before_the_first_failure():
    """n = 5000 at 95 %: a mean of 0 certifies a risk of sqrt(ln 20 / 10000) = 0.017308 and no less.
    The walk does not resume behind a failure."""
    zero = np.zeros((1, 5000))
    assert script.certify(zero, 0.01731) == 0 and script.certify(zero, 0.01730) is None

    def with_mean(mean):
        return (np.arange(5000) < mean * 5000).astype(float)
    # risk 0.05 leaves room for means up to 0.05 - 0.017308 = 0.032692
    losses = [with_mean(m) for m in (0.0, 0.01, 0.0326, 0.0328, 0.0, 0.0)]
    assert script.certify(losses, 0.05) == 2
    assert script.certify(losses[3:], 0.05) is None
    assert script.certify(losses[:2], 0.05) == 1


def test_the_guarantee_holds_in_simulation():
    """2,000 calibration sets of 500: true risk rises along the path and crosses 0.1 between two
    thresholds that lie close; a wrong choice happens at most 5 % of the time, and choices are bold."""
    rng, true = np.random.default_rng(0), np.linspace(0.0, 0.2, 81)
    chosen = []
    for _ in range(2000):
        draws = rng.random(500)                               # one example's losses are coupled
        chosen.append(script.certify([draws < risk for risk in true], 0.1))
    assert np.mean([true[index] > 0.1 for index in chosen]) <= 0.05
    assert np.median(true[chosen]) > 0.03                     # not safe merely by never leaving
    naive = np.mean([true[max(i for i, r in enumerate(true) if (rng.random(500) < r).mean() <= 0.1)]
                     > 0.1 for _ in range(200)])
    assert naive > 0.2                                        # a rule without slack would be seen


def test_certified_threshold_on_a_model():
    model = build(script)
    cfg = configure(script)
    split = [part[:300] for part in script.load_data(cfg)["calibration"]]
    assert script.certified_threshold(model, split, 0.07) == model.full     # 300 certify 0.071 at best
    assert script.certified_threshold(model, split, 0.95) == pytest.approx(model.cheapest)


def test_the_control_leaves_as_often_but_not_the_sure_ones():
    """At equal MACs in the mean; decisions are another example's, at all layers alike."""
    model = build(script, "shapes", "tiny", "--depth", "4")
    data = script.load_data(configure(script))
    spread_exits(model, script.network_input(data["test"][0][:64]))
    split = [part[:250] for part in data["test"]]
    own, dealt = script.evaluate(model.masked, split, 0.5), script.evaluate_random(model, split, 0.5)
    assert sorted(own["macs"]) == sorted(dealt["macs"])
    assert (own["macs"] != dealt["macs"]).mean() > 0.3 and len(np.unique(own["macs"])) >= 3
