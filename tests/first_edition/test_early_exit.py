"""When to leave, what leaving costs, and that the guarantee holds."""
import math

import numpy as np
import pytest
import torch

import early_exit as script
from first_edition.conftest import build, inputs

DATASETS = ("shapes", "pydoc")


def test_certainty_by_hand():
    """Over classes, the last axis: p = (1/2, 1/4, 1/4) and its permutations, and both extremes."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]).log()
    for criterion, expected, least in (("confidence", 0.5, 0.1), ("margin", 0.25, 0.0),
                                       ("entropy", 1 - 1.5 / math.log2(3), 0.0)):
        sure = script.certainty(logits, criterion)
        assert sure.shape == (1, 2) and sure.flatten().tolist() == pytest.approx([expected] * 2)
        flat, peak = torch.zeros(4, 10), torch.eye(10) * 100
        assert script.certainty(flat, criterion).tolist() == pytest.approx([least] * 4, abs=1e-6)
        assert script.certainty(peak, criterion).tolist() == pytest.approx([1.0] * 10)


def test_exit_weights_follow_the_recursion():
    """f_l = g_l head_l + (1 - g_l) f_(l+1), worked backwards, equals the weighted sum."""
    torch.manual_seed(0)
    gate, heads = torch.rand(3, 5), torch.rand(4, 5)
    f = heads[3]
    for g, head in zip(gate.flip(0), heads[:3].flip(0)):
        f = g * head + (1 - g) * f
    weight = script.exit_weights(gate)
    assert torch.allclose((weight * heads).sum(0), f) and torch.allclose(weight.sum(0), torch.ones(5))


@pytest.mark.parametrize("loss", ("sum", "branching"))
@pytest.mark.parametrize("dataset", DATASETS)
def test_nobody_leaves_early_above_every_certainty(dataset, loss):
    model, x = build(script, dataset, "small", loss=loss), inputs(dataset, count=3)
    with torch.no_grad():
        dense = model.twin(x)
    for run in (model.masked, model.skipping):
        logits, macs, _ = run(x, model.full)
        assert torch.allclose(logits, dense, atol=1e-4)
        early_heads = 3 * (model.twin.head_macs + (model.twin.width if loss == "branching" else 0))
        assert macs.tolist() == [model.dense_macs + early_heads * (64 if dataset == "pydoc" else 1)] * 3


@pytest.mark.parametrize("dataset, expected", (
    # `small` by hand: convolutions, then one block of width 64 or 128, then one head
    ("shapes", 16 * 16 * (27 * 32 + 9 * 32 + 32 * 32) + 8 * 8 * (288 * 64 + 9 * 64 + 64 * 64)
     + 64 * (4 * 64 * 64 + 2 * 64 * 64 + 8 * 64 * 64) + 640),
    ("pydoc", 64 * (4 * 128 * 128 + 2 * 64 * 128 + 8 * 128 * 128 + 128 * 128))))
def test_everything_leaves_at_the_first_head_at_zero(dataset, expected):
    """Exactly stem + first block + one head."""
    model, x = build(script, dataset, "small"), inputs(dataset, count=3)
    _, macs, _ = model.skipping(x, 0.0)
    assert macs.tolist() == [expected] * 3 == [model.macs_leaving_at[0]] * 3
    if dataset == "shapes":
        first = model.heads[0](model.norms[0](model.twin.blocks[0](model.twin.embed(x))).mean(1))
        assert torch.allclose(model.skipping(x, 0.0)[0], first, atol=1e-4)


@torch.no_grad()
def spread_exits(model, x):
    """Scale each early head, or shift its gate, until a third of what it sees is surer than 1/2."""
    x = model.twin.embed(x)
    for layer, head in enumerate(model.heads):
        x = model.twin.blocks[layer](x)
        if model.loss == "branching":
            model.gates[layer].bias -= torch.logit(model.answer_at(layer, x)[1]).quantile(2 / 3)
            continue
        for _ in range(60):
            factor = 1.15 if model.answer_at(layer, x)[1].quantile(2 / 3) < 0.5 else 1 / 1.1
            head.weight *= factor
            head.bias *= factor


@pytest.mark.parametrize("loss", ("sum", "branching"))
@pytest.mark.parametrize("dataset", DATASETS)
def test_leaving_at_every_depth_in_one_batch(dataset, loss):
    """Some leave at each of the four exits; each answer is that of the head it left by."""
    model, x = build(script, dataset, "small", loss=loss).double(), inputs(dataset, count=64)
    x = x.double() if x.is_floating_point() else x
    spread_exits(model, x)
    logits, depth = model.decide(x, 0.5)
    assert set(depth.unique().tolist()) == {1, 2, 3, 4}
    skipped, macs, token_macs = model.skipping(x, 0.5)
    assert torch.allclose(skipped, logits, atol=1e-9)
    assert torch.equal(macs, model.cost(depth)[0]) and torch.equal(token_macs, model.cost(depth)[1])
    if dataset == "shapes":                  # images: the exit's own logits, and its price
        exits = model.all_answers(x)[0]
        chosen = exits[depth - 1, torch.arange(64)]
        assert torch.allclose(skipped, chosen, atol=1e-9)
        assert macs.tolist() == [model.macs_leaving_at[d - 1] for d in depth]
    else:                                    # the first character's exit depends on nothing else
        assert (depth[:, 0] == 1 + (model.all_answers(x)[1][:, :, 0] >= 0.5).int().argmax(0)).all()


def test_keys_are_charged_to_the_character_that_asks():
    """A window of four by hand: L = 2, only positions 1 and 2 go on. In the second block position 1
    computes the keys of 0 and 1, position 2 its own, and nobody ever needs the key of 3."""
    model = build(script, "pydoc")
    C, T = 32, 4
    key, query, mlp, head = 2 * C * C, 2 * C * C + 2 * T * C, 8 * C * C, 128 * C
    first = key + query + mlp + head
    _, token_macs = model.cost(torch.tensor([[1, 2, 2, 1]]))
    second = query + mlp + head
    assert token_macs.tolist() == [[first, first + second + 2 * key, first + second + key, first]]


def test_all_heads_train():
    """Both losses, on `shapes`: every exit far above the 10 % of chance after 300 steps."""
    data = None
    for loss in ("sum", "branching"):
        torch.manual_seed(0)
        cfg = script.Config(dataset="shapes", size="tiny", device="cpu", steps=300, batch=32,
                            loss=loss)
        data, model = data or script.load_data(cfg), script.Model(cfg)
        script.train(model, data, cfg, script.objective)
        correct, *_ = script.every_exit(model, [part[:1000] for part in data.test])
        assert correct.shape == (2, 1000) and correct.mean(1).min() > 0.25


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
    violations = np.mean([true[index] > 0.1 for index in chosen])
    assert violations <= 0.05
    assert np.median(true[chosen]) > 0.03                     # not safe merely by never leaving
    naive = np.mean([true[max(i for i, r in enumerate(true) if (rng.random(500) < r).mean() <= 0.1)]
                     > 0.1 for _ in range(200)])
    assert naive > 0.2                                        # a rule without slack would be seen


def test_certified_threshold_on_a_model():
    torch.manual_seed(0)
    cfg = script.Config(dataset="shapes", size="tiny", device="cpu", steps=60, batch=64)
    data, model = script.load_data(cfg), script.Model(cfg)
    script.train(model, data, cfg, script.objective)
    with pytest.raises(script.UserError, match="too few"):
        script.certified_threshold(model, [part[:50] for part in data.calibration], 0.02)
    few = [part[:300] for part in data.calibration]
    assert script.certified_threshold(model, few, 0.95) == 0.0                  # anything goes


def test_gain_by_certainty_by_hand():
    """20 examples, the surer the less there is to gain: tenths of two."""
    gain = np.linspace(1.9, 0.0, 20)
    order = np.random.default_rng(0).permutation(20)                # in no order of certainty
    loss = np.stack([3 + gain, np.full(20, 3.0)])[:, order]
    sure = np.stack([np.arange(20) / 20, np.full(20, np.inf)])[:, order]
    assert script.gain_by_certainty(loss, sure) == pytest.approx(gain.reshape(10, 2).mean(1))
