"""The statistics to nine digits, what the report says about logs whose truth is known, every refusal,
and --train from nothing."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare_rankings as script
from conftest import NAMES, ROOT, configure, scripts

FIVE, DENSE = script.METHODS, 1000000
SWEEP = (0.5, 0.7, 0.85, 1.0)

def spearman(x, y):
    return script.correlate(np.stack([x, y], 1))[0, 1]

def spearman_of_normals(r):
    """What Pearson's r between normal variables is as Spearman's rho."""
    return 6 / np.pi * np.arcsin(r / 2)

def simulate(folder, methods=FIVE, seeds=range(3), N=1500, shared=0.5, own=0.3, same_seed=0.0, constant=(),
             change=None):
    """Write logs whose MACs are the sum of a difficulty shared by all methods, one of the method, one of
    the seed's number whatever the method, and noise; their weights are variances. Returns the paths."""
    rng, paths = np.random.default_rng(0), []
    label, latent = rng.integers(10, size=N), rng.standard_normal(N)
    effects = {seed: rng.standard_normal(N) for seed in seeds}
    for method in methods:
        taste = rng.standard_normal(N)
        for seed in seeds:
            z = (np.sqrt(shared) * latent + np.sqrt(own) * taste + np.sqrt(same_seed) * effects[seed]
                 + np.sqrt(1 - shared - own - same_seed) * rng.standard_normal(N))
            share = np.argsort(np.argsort(z)) / (N - 1) - 0.5
            share = np.zeros(N) if method in constant else share
            macs = [(DENSE * (b + (b < 1) * 0.4 * share)).astype(np.int64) for b in SWEEP]
            loss = np.exp(latent + np.sqrt(same_seed) * effects[seed] + 0.5 * rng.standard_normal(N))
            right = loss < np.quantile(loss, 0.7)
            arrays = dict(label=label, prediction=label, loss=loss, macs=macs[0], sweep_macs=macs,
                          sweep_loss=np.tile(loss, (4, 1)), sweep_correct=np.tile(right, (4, 1)) * 1.0)
            clock = {f"{run}_ms_batch_{batch}": 2.0 for run in ("static", "skipping") for batch in (1, 256)}
            meta = dict(schema=3, name=method, script=method, dataset="cifar10", size="tiny",
                        seed=seed, test_sha256="0" * 64, static_macs=DENSE, wall_clock=clock,
                        random=[dict(accuracy=0.6, loss=3.0)] * 4, width=32, depth=2, epochs=3)
            if change and change(arrays, meta, len(paths)) == "skip":
                continue
            path = folder / f"{meta['name']}-s{seed}.npz"
            np.savez_compressed(path, **arrays, meta=json.dumps(meta))
            paths.append(path)
    return paths

@pytest.fixture
def run(run, tmp_path):
    """run(*options) -> exit status, stdout, stderr of the command line, in an empty folder."""
    return lambda *options: run("compare_rankings", *map(str, options), cwd=tmp_path)

@pytest.fixture
def report(run):
    """report(*options) -> what the command prints when all is well, and the rest of the report."""
    def run_well(*options):
        status, printed, errors = run(*options)
        assert status == 0, errors
        path = re.search(r"wrote (\S+);", printed)[1]
        return printed + Path(path).read_text().split("# How to read")[0]
    return run_well

@pytest.fixture
def few_samples(monkeypatch):
    """Intervals from 20 samples, and pictures that nobody saves: for tests that are about other things."""
    monkeypatch.setattr(script.study, "__defaults__", (None, 20))
    monkeypatch.setattr(script.Figure, "savefig", lambda figure, path, dpi: None)

@pytest.mark.parametrize("x, y, rho", (
    ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], 0.8),
    ([1, 2, 2, 3, 3, 3, 4, 4], [2, 1, 3, 3, 4, 4, 4, 5], 33.75 / np.sqrt(39 * 39.5)),
    ([1, 1, 1, 2, 2, 2, 3, 3, 3, 3], range(10), np.sqrt(73.5 / 82.5)),
    ([0] * 7 + [1] * 3, [5, 1, 4, 2, 3, 9, 7, 6, 8, 10], 0.5698028823),
    ([0] * 50 + [1] * 50, [0] * 90 + [1] * 10, 1 / 3),        # one difficulty, two ways to exit: a ceiling
    ([1, 1, 2, 2], [1, 2, 1, 2], 0)))
def test_spearman(x, y, rho):
    x, y = np.array(x), np.array(y)
    for a, b, sign in ((x, y, 1), (y, x, 1), (-x, y, -1), (x ** 3, 7 * y + 2, 1)):
        assert spearman(a, b) == pytest.approx(sign * rho, abs=1e-9)

def test_within_class():
    columns = np.array([[1, 2, 2, 3, 1, 3, 4, 4], [2, 1, 3, 3, 5, 6, 6, 8]]).T
    label = np.repeat([0, 1], 4)
    assert spearman(*columns.T) == pytest.approx(0.6914107177, abs=1e-9)
    assert [spearman(*columns[label == k].T) for k in (0, 1)] == pytest.approx([1 / 2, 5 / 6], abs=1e-9)
    assert script.within_class(columns, label, least=4)[0, 1] == pytest.approx(2 / 3, abs=1e-9)
    assert np.isnan(script.within_class(columns, label, least=5)).all()

def test_overlap_shares_ties():
    x, y = np.array([4, 4, 3, 3, 3, 2, 1, 1]), np.array([5, 3, 4, 4, 1, 2, 2, 0])
    for k, share in (3, 5 / 9), (4, 5 / 6):
        assert script.top_overlap(np.stack([x, y], 1), k)[0, 1] == pytest.approx(share, abs=1e-9)

def rankings_of(names, seeds):
    return [script.Ranking(name, seed, None) for name, seed in zip(names, seeds)]

def test_ties_limit_rho():
    """Half of the examples are dear in one ranking, a tenth in the other, elsewhere: were they in one
    order, rho would be (0.1 - 0.5 * 0.1) / sqrt(0.25 * 0.09) = 1/3."""
    place = np.arange(1000)
    rankings = [script.Ranking("a", 0, place >= 500), script.Ranking("b", 1, place < 100)]
    found = script.study([ranking._replace(costs=ranking.costs.astype(int)) for ranking in rankings], resamples=1)
    assert found["ceiling"][0, 1] == pytest.approx(1 / 3) and found["raw"][0, 1] < 0

def test_agreement_by_hand():
    """Two methods with two seeds each: the pairs are (A0, B1) and (A1, B0), never (A0, B0)."""
    rho = np.array([[1, .64, .9, .3], [.64, 1, .5, .9], [.9, .5, 1, .35], [.3, .9, .35, 1]])
    both = rankings_of("AABB", [0, 1, 0, 1])
    raw, full = script.agreement(rho, both)
    assert np.allclose(raw, [[.64, .4], [.4, .35]]) and np.allclose(full[0, 1], .4 / (.8 * .35 ** .5))
    raw, full = script.agreement(rho[1:3, 1:3], rankings_of("AB", [1, 0]))     # one seed each, different ones
    assert raw[0, 1] == .5 and np.isnan(full[0, 1]) and np.isnan(raw[0, 0])
    raw, full = script.agreement(rho[:3:2, :3:2], rankings_of("AB", [5, 5]))   # nothing but one seed
    assert raw[0, 1] == .9 and np.isnan(full).all()
    raw, _ = script.agreement(rho, rankings_of("AABC", [0, 1, 0, 0]))           # B and C have nothing else
    assert np.allclose(raw[:, 1:], [[.5, .9], [np.nan, .35], [.35, np.nan]], equal_nan=True)
    raw, full = script.agreement(rho * 0.85, both)              # B is now reliable to 0.2975: below the floor
    assert np.isnan(full[0, 1]) and np.isfinite(full[0, 0]) and raw[0, 1] > 0
    assert script.agreement(np.where(rho == .5, 1, rho) * 0.9, both)[1].max() <= 1       # noise cannot exceed 1
    raw, full = script.agreement(rho[:3, :3], rankings_of(["A", "A", "people"], [0, 1, None]))
    assert np.isclose(raw[0, 1], .7) and np.isnan(full[0, 1])   # people have no seeds
    assert np.isnan(script.agreement(-rho, both)[1]).all()      # seeds that contradict

def test_bootstrap_is_spearman_of_repeated_rows():
    """Against rows that are really repeated, in blocks of neighbours."""
    rng = np.random.default_rng(1)
    columns = rng.integers(5, size=(60, 3))
    draws = np.random.default_rng(0)
    for rho in script.bootstrap(columns, 3, block=4):
        rows = (4 * draws.integers(15, size=15)[:, None] + np.arange(4)).ravel()
        assert np.allclose(rho, script.correlate(columns[rows]), atol=1e-12)
    columns = rng.standard_normal((1610, 2)).cumsum(0)      # neighbours are alike: fewer examples than it seems
    columns = columns[10:] - columns[:-10]
    widths = [script.bootstrap(columns, 200, block)[:, 0, 1].std() for block in (1, 16)]
    assert widths[1] > 1.8 * widths[0]
    assert np.isfinite(script.bootstrap(columns[:30], 1, 16)).all()     # ten blocks at least

def static(name, share, quality, width=32, depth=8, seed=0, text=False):
    return SimpleNamespace(name=name, kind="full" if name == FIVE[0] else "smaller", text=text, seed=seed,
                           meta=dict(width=width, depth=depth), static_macs=share * DENSE, quality=np.array([quality]))

def test_the_frontier_by_hand():
    """Narrower: 60 % at 0.4 and 72 % at 0.8; shallower: 70 % at 0.5. The better of both lines, to 80 %."""
    logs = [static(FIVE[0], 1, 0.7), static(FIVE[0], 1, 0.9, seed=1), static("depth_4", 0.5, 0.7, depth=4),
            static("width_9", 0.4, 0.6, width=9), static("width_20", 0.8, 0.72, width=20)]
    bigger, sparse = static("again", 1, 0.2), static("depth_2", 0.5, 0.9, depth=2)
    sparse.kind = "method"                                  # trained with a penalty
    for more in [], [bigger, sparse]:
        for share, best in ((1, 0.8), (0.5, 0.7), (0.75, 0.75), (0.4, 0.6), (0.45, 0.615), (0.9, 0.78)):
            assert script.frontier(logs + more, share * DENSE) == pytest.approx(best)
    assert np.isnan(script.frontier(logs, 0.36 * DENSE)) and np.isnan(script.frontier(logs[:2], 0.7 * DENSE))
    assert np.isnan(script.frontier(logs[2:], 0.7 * DENSE)) and np.isnan(script.frontier(logs, 1.04 * DENSE))
    texts = [static(FIVE[0], 1, 1.5, text=True), static("depth_4", 0.5, 1.9, depth=4, text=True),
             static("width_9", 0.5, 1.7, width=9, text=True)]
    assert script.frontier(texts, 0.75 * DENSE) == pytest.approx(1.6)               # of a loss less is better

def test_verdicts():
    q = np.array([0.8, 0.82])
    assert script.verdict(q, q - 0.01, q - 0.02, 0.8129, False) == "yes"
    assert script.verdict(q, q - 0.01, q - 0.02, 0.8131, False) == "no: worse than the full network"
    assert script.verdict(q, q - 0.1, [0.8, 0.7], 0.9, False) == (
        "no: not better than random decisions, worse than the full network")
    assert script.verdict(q, [np.nan, 0.7], q - 0.1, 0.8, False).startswith("unknown")
    assert script.verdict(q, [np.nan, np.nan], q, 0.8, False) == "no: not better than random decisions"
    assert script.verdict(q, q + 0.01, q + 0.02, 0.8001, True) == "yes"     # of a loss less is better
    assert script.verdict(q, q + 0.01, q + 0.02, 0.7999, True) == "no: worse than the full network"

def test_the_report_says_what_pays(run, report, tmp_path, few_samples):
    """Two static networks of other sizes; accuracies that decide each way. They are no rankings."""
    def change(arrays, meta, count):
        quality = {FIVE[0]: 0.8, "depth_1": 0.6, "early_exit": 0.79, "moe": 0.9}[meta["name"]]
        arrays["sweep_correct"] = np.full((4, 1500), quality)
        if meta["name"] == "depth_1":
            meta.update(script=FIVE[0], static_macs=DENSE // 2, depth=1)

    simulate(tmp_path, ["relu_sparsity", "depth_1", "early_exit", "moe"], range(2), change=change)
    printed = report(tmp_path)
    assert re.search(r"moe \| 2 \| 0.500 .* \| 0.9000 .* \| 0.6000 .* \| 0.6000 .* \| 0.8000 \| yes \|", printed)
    assert re.search(r"early_exit \| 2 \| 0.850 .* \| 0.7400 .* \| no: worse than the full network \|", printed)
    assert "of relu_sparsity, early_exit and moe" in printed and "depth_1" not in printed
    for path in tmp_path.glob("[em]*.npz"):                 # static networks alone
        path.unlink()
    printed = report(tmp_path)
    assert "fewer than two methods rank" in printed and "agree" not in printed
    for path in tmp_path.glob("relu*.npz"):                 # and without the full one
        path.unlink()
    assert run(tmp_path)[2].count("rank nothing") == 1

@pytest.mark.parametrize("shared, own, same_seed", ((0.5, 0.3, 0.0), (0.0, 0.6, 0.3), (0.4, 0.2, 0.3)))
def test_the_true_agreement_is_recovered(shared, own, same_seed, tmp_path):
    """Inside the interval, which the same-seed pairs would leave."""
    paths = simulate(tmp_path, FIVE[1:4], N=4000, shared=shared, own=own, same_seed=same_seed)
    rankings, _ = script.rank(script.gather(paths))
    found = script.study(rankings, resamples=100)
    pairs = np.triu_indices(3, 1)
    low, high = (np.median(found[end][pairs]) for end in ("low", "high"))
    truth = spearman_of_normals(shared) / spearman_of_normals(shared + own)
    assert low < truth < high and high - low < 0.2
    assert np.median(found["disattenuated"][pairs]) == pytest.approx(truth, abs=0.05)
    if same_seed:
        rho = script.correlate(np.stack([ranking.costs for ranking in rankings], 1))
        assert np.mean([rho[i, 3 + i] for i in range(3)]) > spearman_of_normals(shared) + 0.2

@pytest.mark.parametrize("shared, own, words", (
    (0.7, 0.0, "agree strongly"), (0.4, 0.4, "agree moderately"), (0.0, 0.8, "do not agree")))
def test_the_report_says_what_is_so(shared, own, words, report, tmp_path):
    simulate(tmp_path, shared=shared, own=own, same_seed=0.1)
    printed = report(tmp_path, "--out", "there")
    folder = tmp_path / "there/figures/cifar10-tiny"
    written = (folder / "report.md").read_text(encoding="utf-8")
    answer = written.splitlines()[2]
    assert f" {words}: mean disattenuated rho " in answer and answer in printed and "nan" not in written
    pictures = re.findall(r"\((\w+\.png)\)", written)
    assert set(pictures) == {"agreement.png", "quality.png", "deciles.png", "time.png"}
    for name in pictures:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG" and (folder / name).stat().st_size > 15000
    right = [np.load(tmp_path / f"relu_sparsity-s{seed}.npz")["sweep_correct"][-1] for seed in range(3)]
    some = sum(0 < sum(r[i] for r in right) < 3 for i in range(1500))
    assert f"{some:,} of 1,500 examples are neither trivial nor impossible" in written
    assert re.findall(r"These, at (.*) of the MACs", written) == ["0.5", "0.7"]

def test_trivial_and_impossible_images_are_left_out(tmp_path):
    """Among the others costs have nothing in common."""
    rng = np.random.default_rng(0)
    easy, z = rng.random(3000) < 0.5, rng.standard_normal(3000)

    def change(arrays, meta, count):
        macs = 1e5 + 1e4 * np.where(easy, z - 5, np.random.default_rng(count).standard_normal(3000))
        arrays["sweep_macs"] = np.outer([5, 7, 8, 10], macs)
        arrays["sweep_correct"] = np.tile(easy | (meta["seed"] == 0), (4, 1)) * 1.0

    logs = script.gather(simulate(tmp_path, FIVE[:3], range(2), N=3000, change=change))
    rows = [line for line in script.telling_tables(logs) if "early_exit and gumbel" in line]
    assert len(rows) == 2 and all(abs(float(row.split("|")[4])) < 0.1 for row in rows)
    assert f"{(~easy).sum():,} of 3,000 examples" in script.telling_tables(logs)[0]
    assert script.study(script.rank(logs[2:], budget=0.5)[0], resamples=2)["raw"][0, 1] > 0.7
    logs[2].spent = logs[2].spent + 0.1                     # a run that reaches 0.7, no longer 0.5
    assert len([line for line in script.telling_tables(logs) if "early_exit and gumbel" in line]) == 2
    logs[1].right = logs[0].right                           # then no example tells
    assert len(script.telling_tables(logs)) == 2

def test_constant_macs_rank_nothing(report, tmp_path, few_samples):
    """Said, and nowhere else than where MACs are the matter."""
    simulate(tmp_path, FIVE[:4], range(2), constant=("moe",))
    printed = report(tmp_path)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))
    assert "rank nothing: moe-s0, moe-s1." in printed and "nan" not in printed
    assert "moe" not in printed.splitlines()[0] and "and moe" not in printed

def test_what_cannot_be_told_is_unknown(report, tmp_path, few_samples):
    """One seed; a log with nothing but what the README asks for; a random control at other MACs; data of
    one's own, whose difficulty one log knows. A log that is named twice counts once."""
    def bare(arrays, meta, count):
        meta["dataset"] = "mine"
        meta["random"] = [dict(accuracy=0.6, budget=0.01)] * 4
        if meta["name"] == "my_method":
            for key in ("wall_clock", "epochs", "script", "random"):
                del meta[key]
            arrays["difficulty"] = arrays["macs"]

    simulate(tmp_path, ["early_exit", "my_method"], [0], change=bare)
    printed = report(tmp_path, "early_exit-s0.npz")
    assert "of early_exit and my_method" in printed and "mean raw rho" in printed
    assert "| early_exit and my_method | unknown | unknown | " in printed
    assert "0.6000" not in printed and "unknown: something to compare with" in printed
    assert "| my_method and known difficulty |" in printed

def test_variants_of_one_script_are_not_two_types(report, tmp_path, few_samples):
    """A run that was loaded, with equal MACs, does not make the answer say that all agree."""
    def change(arrays, meta, count):
        if meta["name"] == "moe_loaded":
            meta["script"] = "moe"

    simulate(tmp_path, ("early_exit", "moe", "moe_loaded"), shared=0.3, own=0.5, change=change)
    paths = [tmp_path / f"moe{more}-s{seed}.npz" for seed in range(3) for more in ("", "_loaded")]
    for path, other in zip(paths[::2], paths[1::2]):
        with np.load(path) as log, np.load(other) as loaded:
            kept = dict(log, meta=loaded["meta"])
        np.savez_compressed(other, **kept)
    answer = report(tmp_path).splitlines()[0]
    assert "agree weakly" in answer and "2 of 2 pairs" in answer
    for path in tmp_path.glob("early*"):
        path.unlink()
    assert "agree strongly" in report(tmp_path).splitlines()[0]      # there is nothing else

def test_people_and_known_difficulty_are_columns(report, tmp_path, few_samples):
    known = []

    def know(arrays, meta, count):
        known.append(arrays["macs"].astype(np.float32))
        arrays["difficulty"] = known[0]

    simulate(tmp_path, FIVE[:2], range(2), change=know, shared=0.3, own=0.2, same_seed=0.4)
    with np.load(tmp_path / "early_exit-s0.npz") as log:
        label = log["label"]
    counts = np.eye(10, dtype=np.int64)[label] * 30 + np.random.default_rng(0).integers(9, size=(1500, 10))
    np.save(tmp_path / "people.npy", counts)
    printed = report(tmp_path, "--human", tmp_path / "people.npy")
    rows = re.findall(r"^\| relu_sparsity and (.*?) \| (.*?) \| (.*?) \| (.*?) \|", printed, re.M)
    raw = {row[0]: float(row[3]) for row in rows}
    assert {"known difficulty", "people", "static loss"} < raw.keys()
    macs, loss = ([np.load(tmp_path / f"relu_sparsity-s{s}.npz")[key] for s in (0, 1)] for key in ("macs", "loss"))
    assert raw["known difficulty"] == pytest.approx(np.mean([spearman(m, known[0]) for m in macs]), abs=0.006)
    exits = [np.load(tmp_path / f"early_exit-s{s}.npz")["macs"] for s in (0, 1)]
    whole = np.mean([spearman(m, known[0]) for m in exits]) / spearman(*exits) ** 0.5       # its own is 1
    assert f"| early_exit and known difficulty | strong | {whole:.2f} " in printed
    doubt = script.doubt_of_people(tmp_path / "people.npy", script.Log(tmp_path / "early_exit-s0.npz"))
    assert doubt[0] == pytest.approx(-sum(p * np.log(p) for p in counts[0] / counts[0].sum() if p))
    assert raw["people"] == pytest.approx(np.mean([spearman(m, doubt) for m in macs]), abs=0.006)
    assert abs(spearman(macs[0], loss[0]) - spearman(macs[0], loss[1])) > 0.02
    other_seed = [spearman(macs[0], loss[1]), spearman(macs[1], loss[0])]
    assert raw["static loss"] == pytest.approx(np.mean(other_seed), abs=0.006)

@pytest.mark.parametrize("key, value, message", (
    ("test_sha256", "1" * 64, "test split or its order differ"),
    ("dataset", "shapes", "test split or its order differ"),
    ("label", np.zeros(1500), "test split or its order differ"), ("schema", 1, "unknown schema"),
    ("epochs", 4, "epochs differ"), ("static_macs", 0, "of the wrong kind"),
    ("static_macs", np.nan, "of the wrong kind"), ("seed", "1", "of the wrong kind"),
    ("size", "../../elsewhere", "contains a folder"), ("sweep_macs", None, "KeyError: 'sweep_macs'"),
    ("macs", -np.ones(1500), "macs holds"), ("loss", np.ones(1499), "loss has shape"),
    ("sweep_macs", np.zeros((0, 1500)), "no sweep"), ("loss", np.full(1500, np.nan), "loss holds NaN"),
    ("loss", np.full(1500, "1.0"), "loss holds NaN"), ("wall_clock", "fast", "is not a log"),
    ("random", [0.5] * 4, "is not a log"), ("random", [], "is not a log")), ids=str)
def test_refusals(key, value, message, run, tmp_path):
    """One line about the second of two logs."""
    def change(arrays, meta, count):
        kept = arrays if key in arrays else meta
        kept[key] = value if count else kept[key]
        if kept[key] is None:
            del kept[key]

    simulate(tmp_path, FIVE[:2], [0], change=change)
    status, printed, errors = run(tmp_path)
    assert status == 2 and errors.count("\n") == 1 and printed == ""
    assert errors.startswith("compare_rankings.py: ") and message in errors and "-s0.npz" in errors

@pytest.mark.parametrize("name, message", (
    ("text.npz", "is not a log"), ("empty.npz", "is not a log"), ("short.npz", "is not a log"),
    ("altered.npz", "is not a log"), ("array.npy", "is not a log"), ("objects.npz", "is not a log"),
    ("other.npz", "KeyError: 'meta'"), ("copy.npz", "the same method and seed"), ("nowhere.npz", "No such file")))
def test_files_that_are_no_logs(name, message, run, tmp_path):
    simulate(tmp_path, FIVE[:1], [0])
    log = (tmp_path / "relu_sparsity-s0.npz").read_bytes()
    (tmp_path / "copy.npz").write_bytes(log)
    (tmp_path / "text.npz").write_text("not a log")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "short.npz").write_bytes(log[:len(log) // 2])
    (tmp_path / "altered.npz").write_bytes(log[:2000] + bytes(len(log) - 4000) + log[-2000:])
    np.save(tmp_path / "array.npy", np.arange(5))
    np.savez(tmp_path / "other.npz", x=np.arange(5))
    np.savez(tmp_path / "objects.npz", meta=np.array([{}], object))
    status, _, errors = run(tmp_path / "relu_sparsity-s0.npz", tmp_path / name)
    assert status == 2 and errors.count("\n") == 1 and message in errors and name in errors

@pytest.mark.parametrize("counts, message", (
    (np.ones((1500, 9), int), "(1500, 9)"), (np.ones((1499, 10), int), "not (1499, 10)"),
    (np.ones(15000), "not (15000,)"), (np.zeros((1500, 10), int), "nobody labelled"),
    (np.eye(10)[np.arange(1500) % 10] * 50, "official order")))
def test_people_of_another_shape_are_refused(counts, message, run, tmp_path):
    simulate(tmp_path, FIVE[:2], [0])
    np.save(tmp_path / "people.npy", counts)
    status, _, errors = run(tmp_path, "--human", tmp_path / "people.npy")
    assert status == 2 and errors.count("\n") == 1 and message in errors and "people.npy" in errors

@pytest.mark.parametrize("options, message", (
    (["--nonsense"], "unrecognized"), (["--train", "--seeds", "0"], "at least 1"), ([], "name a folder"),
    (["--jobs", "many"], "invalid int"), (["--train", "--dataset", "mnist"], "mnist"), (["empty"], "no logs")))
def test_bad_options(options, message, run, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, errors = run(*options)
    assert status == 2 and message in errors.splitlines()[-1] and "Traceback" not in errors

def test_train_from_nothing_and_resume(run, report, tmp_path, monkeypatch):
    """What is missing, and no more; a run that fails does not stop the others. (Two methods, for time.)"""
    monkeypatch.setattr(script, "METHODS", ("relu_sparsity", "moe"))
    options = ("--train", "--dataset", "pydoc", "--size", "tiny", "--seeds", 1, "--device", "cpu", "--epochs", 0.05)
    report(*options)
    logs = tmp_path / "logs/pydoc-tiny"
    names = {path.name for path in logs.glob("*.npz")}
    assert names == {f"{name}-s0.npz" for name in ("relu_sparsity", "moe", "depth_2", "width_21")}
    written = (tmp_path / "figures/pydoc-tiny/report.md").read_text(encoding="utf-8")
    assert "| moe | 1 |" in written and written.startswith("# pydoc-tiny\n\n**On ")
    assert (tmp_path / "figures/pydoc-tiny/examples.png").stat().st_size > 30000
    (logs / "moe-s0.npz").unlink()
    kept = (logs / "relu_sparsity-s0.npz").stat().st_mtime_ns
    assert report(*options) and (logs / "moe-s0.npz").exists()
    assert (logs / "relu_sparsity-s0.npz").stat().st_mtime_ns == kept                # and not again
    (logs / "depth_2-s0.npz").unlink()
    (logs / "depth_2-s0.part").mkdir()
    status, printed, errors = run(*options)
    assert status == 1 and "failed with status 2" in errors and "Does it pay?" in printed

SLEEPER = """
import argparse, sys, time
def options(argv):
    return argparse.Namespace(dataset="pydoc", size="tiny", depth=2, width=9)
if __name__ == "__main__":
    print("child", flush=True)
    time.sleep(100)
"""

def test_stopping_with_ctrl_c(tmp_path):
    """In a process group of its own, as from a terminal, while a child runs: both end, no other begins."""
    (tmp_path / "compare_rankings.py").write_bytes((ROOT / "compare_rankings.py").read_bytes())
    (tmp_path / f"{FIVE[0]}.py").write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, "compare_rankings.py", "--train", "--dataset", "pydoc"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert b"child" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=30)      # returns when the children have closed their ends, too
    assert process.returncode == 2 and b"child" not in printed
    assert errors.endswith(b"compare_rankings.py: stopped\n")

def test_pictures_show_the_images_of_the_logs(report, tmp_path):
    """Images only where their labels are those of the logs."""
    data = scripts[NAMES[0]].load_data(configure(scripts[NAMES[0]]))

    def real(arrays, meta, count):
        meta.update(dataset="shapes")
        arrays.update(label=data["test"][1].numpy(), difficulty=data["difficulty"])
    simulate(tmp_path, FIVE[:3], range(2), N=4000, change=real)
    report(tmp_path)
    assert (tmp_path / "figures/shapes-tiny/examples.png").stat().st_size > 100000
    log = script.Log(tmp_path / "early_exit-s0.npz")
    assert np.array_equal(script.test_images(log, tmp_path), data["test"][0].numpy())
    log.label = log.label[::-1]
    assert script.test_images(log, tmp_path) is None
