"""The statistics to nine digits, what the report says about logs whose truth is known, every refusal,
and --train from nothing."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import compare_rankings as script
from conftest import NAMES, ROOT, configure, scripts

FIVE, DENSE = script.METHODS, 1000000


def spearman_of_normals(r):
    """What Pearson's r between normal variables is as Spearman's rho."""
    return 6 / np.pi * np.arcsin(r / 2)


def simulate(folder, methods=FIVE, seeds=range(3), N=1500, shared=0.5, own=0.3, same_seed=0.0, text=False,
             ties=("early_exit",), flipped=(), constant=(), classes=0.0, change=None):
    """Write logs whose costs are the sum of a difficulty shared by all methods, one of the method, one of
    the seed's number whatever the method, and noise; their weights are variances. Returns the paths."""
    rng, T, paths = np.random.default_rng(0), 16, []
    label = rng.integers(10, size=N)
    latent = np.sqrt(1 - classes) * rng.standard_normal(N) + np.sqrt(classes) * rng.standard_normal(10)[label]
    effects = {seed: rng.standard_normal(N) for seed in seeds}
    noise = 1 - shared - own - same_seed
    for method in methods:
        taste = rng.standard_normal(N)
        for seed in seeds:
            z = (np.sqrt(shared) * latent * (-1 if method in flipped else 1) + np.sqrt(own) * taste
                 + np.sqrt(same_seed) * effects[seed] + np.sqrt(noise) * rng.standard_normal(N))
            share = np.argsort(np.argsort(z)) / (N - 1)
            if method in ties:
                share = np.digitize(share, (0.25, 0.5, 0.75)) / 3
            shift = np.linspace(-1, 1, 9)[:, None]
            sweep = (DENSE * (0.4 + 0.6 * np.clip(share + shift, 0, 1))).astype(np.int64)
            macs = (DENSE * (0.4 + 0.6 * share)).astype(np.int64)
            macs[:] = DENSE // 2 if method in constant else macs
            loss = np.exp(latent + 0.5 * rng.standard_normal(N)).astype(np.float32)
            right = loss < np.quantile(loss, 0.7)
            prediction = np.where(right, label, (label + 1) % 10)
            arrays = dict(label=label, prediction=prediction, loss=loss, macs=macs,
                          sweep_threshold=shift[:, 0], sweep_macs=sweep,
                          sweep_loss=np.tile(loss, (9, 1)),
                          sweep_correct=np.tile(right, (9, 1)).astype(np.float32))
            if text:
                letters = rng.integers(97, 107, (N, T))
                arrays.update(label=letters if not paths else first["label"], loss=np.tile(loss[:, None], T),
                              prediction=rng.integers(97, 107, (N, T)),
                              token_macs=macs[:, None] // T + rng.integers(1000, size=(N, T)))
            clock = {f"{run}_ms_batch_{batch}": 2.0 + (run == "skipping") * rng.random()
                     for run in ("static", "skipping") for batch in (1, 256)}
            meta = dict(schema=2, name=method, script=method, dataset="shakespeare" if text else "cifar10", size="tiny",
                        seed=seed, test_sha256="0" * 64, static_macs=DENSE, wall_clock=clock,
                        options=dict(budget=0.7, width=32, depth=2))
            first = arrays if not paths else first
            if change and change(arrays, meta, len(paths)) == "skip":
                continue
            path = folder / f"{method}-s{seed}.npz"
            np.savez_compressed(path, **arrays, **({} if meta is None else dict(meta=json.dumps(meta))))
            paths.append(path)
    return paths


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(*options) -> exit status, stdout, stderr of the command line, in an empty folder."""
    def run_command(*options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["compare_rankings.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            script.command_line()
        return stop.value.code or 0, *capsys.readouterr()
    return run_command


def few_samples(monkeypatch, pictures=False):
    """Intervals from 50 samples, and pictures that nobody saves: for tests that are about other things."""
    monkeypatch.setattr(script.study, "__defaults__", (50, 1))
    if not pictures:
        monkeypatch.setattr(script.Figure, "savefig", lambda *args, **options: None)


# --- Values -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x, y, rho", (
    ([1, 2, 3, 4, 5], [1, 3, 2, 5, 4], 0.8),
    ([1, 2, 2, 3, 3, 3, 4, 4], [2, 1, 3, 3, 4, 4, 4, 5], 33.75 / np.sqrt(39 * 39.5)),
    ([1, 1, 1, 2, 2, 2, 3, 3, 3, 3], range(10), np.sqrt(73.5 / 82.5)),
    ([0] * 7 + [1] * 3, [5, 1, 4, 2, 3, 9, 7, 6, 8, 10], 0.5698028823),
    ([12, 12, 24, 24, 24, 36, 36, 48, 48, 48], [.31, .28, .31, .55, .40, .55, .62, .55, .90, .71],
     68.75 / np.sqrt(77.5 * 80)),
    ([1, 1, 2, 2], [1, 2, 1, 2], 0)))
def test_spearman(x, y, rho):
    x, y = np.array(x), np.array(y)
    for a, b, sign in ((x, y, 1), (y, x, 1), (-x, y, -1), (x ** 3, 7 * y + 2, 1)):
        assert script.spearman(a, b) == pytest.approx(sign * rho, abs=1e-9)


def test_constant_compute_has_no_rank():
    assert np.isnan(script.spearman(np.full(4, 4), np.arange(4)))
    rho = script.correlate(script.ranked(np.array([[7, 1, 2], [7, 2, 1], [7, 3, 4]])))
    assert np.isnan(rho[0]).all() and rho[1, 2] == pytest.approx(0.5)
    assert np.isnan(script.top_overlap(np.array([[7, 1], [7, 2], [7, 3]]), 1)[0, 1])


def test_spearman_of_many():
    i = np.arange(10000)
    u = (i * 7919 + 13) % 10007
    v, X = u + (i * 104729) % 4001, np.digitize(u, [5000, 7500, 9000])
    columns = np.stack([X, v, v // 400, u], 1)
    rho = script.correlate(script.ranked(columns))
    assert rho[0, 1] == pytest.approx(0.868150353538, abs=1e-9)
    assert rho[0, 2] == pytest.approx(0.867515142132, abs=1e-9)
    assert rho[3, 1] == pytest.approx(0.933016147134, abs=1e-9)
    highest, lowest = script.tie_ceilings(columns)[:, 0, 1]
    assert highest == pytest.approx(0.924866980763, abs=1e-9)
    against = script.spearman(np.sort(X), np.sort(v)[::-1])
    assert lowest == pytest.approx(against, abs=1e-9) and against < -0.9


def test_tie_ceiling_of_two_ways_to_exit():
    """One difficulty, exit shares (.5, .5) and (.9, .1): they cannot agree more than to 1 / 3."""
    columns = np.stack([np.arange(100) >= 50, np.arange(100) >= 90], 1).astype(int)
    rho = script.correlate(script.ranked(columns))
    assert rho[0, 1] == pytest.approx(1 / 3, abs=1e-9)
    assert script.tie_ceilings(columns)[0, 0, 1] == pytest.approx(1 / 3, abs=1e-9)


def test_within_class_and_partial():
    columns = np.array([[1, 2, 2, 3, 1, 3, 4, 4], [2, 1, 3, 3, 5, 6, 6, 8]]).T
    label = np.repeat([0, 1], 4)
    assert script.spearman(*columns.T) == pytest.approx(0.6914107177, abs=1e-9)
    first, second = (script.spearman(*columns[label == k].T) for k in (0, 1))
    assert (first, second) == pytest.approx((0.5, 0.8333333333), abs=1e-9)
    assert script.within_class(columns, label, least=4)[0, 1] == pytest.approx((first + second) / 2, abs=1e-9)
    assert np.isnan(script.within_class(columns, label, least=5)).all()
    assert script.partial(columns, [label])[0, 1] == pytest.approx(0.7071067812, abs=1e-9)


def test_partial_takes_covariates_out():
    """Two costs that share nothing but a covariate, however it is scaled; one that is its copy."""
    rng = np.random.default_rng(0)
    z, label = rng.standard_normal(4000), rng.integers(10, size=4000)
    columns = np.stack([z + rng.standard_normal(4000), z + rng.standard_normal(4000), z], 1)
    assert script.spearman(*columns[:, :2].T) > 0.4
    rho = script.partial(columns, [label], [np.exp(3 * z)])
    assert abs(rho[0, 1]) < 0.05 and np.isnan(rho[0, 2])


def test_overlap_shares_ties():
    x, y = np.array([4, 4, 3, 3, 3, 2, 1, 1]), np.array([5, 3, 4, 4, 1, 2, 2, 0])
    for k, share in (3, 5 / 9), (4, 5 / 6):
        assert script.membership(x, k).sum() == pytest.approx(k) == script.membership(y, k).sum()
        assert script.top_overlap(np.stack([x, y], 1), k)[0, 1] == pytest.approx(share, abs=1e-9)


def test_agreement_by_hand():
    """Two methods with two seeds each: the pairs are (A0, B1) and (A1, B0), never (A0, B0)."""
    rho = np.array([[1, .64, .9, .3], [.64, 1, .5, .9], [.9, .5, 1, .25], [.3, .9, .25, 1]])
    a = script.agreement(rho, [0, 0, 1, 1], [0, 1, 0, 1])
    assert np.allclose(a.raw, [[.64, .4], [.4, .25]]) and np.allclose(a.low[0, 1], .3)
    assert np.allclose(a.high[0, 1], .5) and np.allclose(a.disattenuated[0, 1], .4 / (.8 * .5))
    single = script.agreement(rho[1:3, 1:3], [0, 1], [1, 0])        # one seed each, different ones
    assert single.raw[0, 1] == .5 and np.isnan(single.disattenuated[0, 1]) and np.isnan(single.raw[0, 0])
    assert np.isnan(script.agreement(rho[:2, :2], [0, 1], [0, 0]).raw).all()
    known = script.agreement(rho[:3, :3], [0, 0, 1], [0, 1, -1], {1: 1.0})
    assert np.isclose(known.disattenuated[0, 1], .7 / .8)
    stack = script.agreement(np.stack([rho, rho]), [0, 0, 1, 1], [0, 1, 0, 1])
    assert stack.disattenuated.shape == (2, 2, 2) and np.allclose(stack.disattenuated[1], a.disattenuated)


def test_costs_at_a_budget():
    sweep = np.array([[1., 1, 1, 1], [1, 1, 1, 5], [1, 1, 5, 5], [5, 5, 5, 5]])
    assert script.at_budget(sweep, 2.5).tolist() == [1, 1, 3, 5]            # halfway between two thresholds
    assert script.at_budget(sweep[::-1], 3).tolist() == [1, 1, 5, 5]
    assert script.at_budget(sweep, 5).tolist() == [5, 5, 5, 5]
    assert np.isnan(script.at_budget(sweep, 5.1)).all() and np.isnan(script.at_budget(sweep, 0.9)).all()


def test_bootstrap_is_spearman_of_repeated_rows():
    """Against rows that are really repeated, in blocks of neighbours; and it takes under a minute."""
    rng = np.random.default_rng(1)
    columns = rng.integers(5, size=(60, 3))
    samples = list(script.bootstrap(columns, 3, block=4, seed=2))
    draws = np.random.default_rng(2)
    for rho in samples:
        rows = (4 * draws.integers(15, size=15)[:, None] + np.arange(4)).ravel()
        assert np.allclose(rho, script.correlate(script.ranked(columns[rows])), atol=1e-12)
    columns, began = rng.integers(3000, size=(10000, 15)), time.process_time()
    assert len(list(script.bootstrap(columns, 20))) == 20
    assert 50 * (time.process_time() - began) < 60


def test_people():
    assert np.allclose(script.entropy(np.array([[5, 5, 0], [10, 0, 0]])), [np.log(2), 0])
    rng = np.random.default_rng(0)
    doubt = rng.random(3000) ** 2 / 2
    sure = rng.binomial(4000, doubt)
    assert script.split_half(np.stack([4000 - sure, sure], 1)) > 0.99      # thousands of people, no chance
    guess = rng.multinomial(20, [0.25] * 4, size=3000)
    assert abs(script.split_half(guess)) < 0.1                             # all images alike


# --- Logs whose truth is known ------------------------------------------------------------------------------

@pytest.mark.parametrize("shared, own, same_seed", ((0.5, 0.3, 0.0), (0.0, 0.6, 0.3), (0.4, 0.2, 0.3)))
def test_the_true_agreement_is_recovered(shared, own, same_seed, tmp_path):
    """Inside the interval, which the same-seed pairs would leave."""
    paths = simulate(tmp_path, FIVE[1:4], N=4000, shared=shared, own=own, same_seed=same_seed, ties=())
    table = script.rankings(script.gather(paths), lambda log: log.macs)
    found = script.study(table, [], [], None, 200)
    low, high = np.percentile(script.typical(found["interval"].disattenuated, range(3))[0], [2.5, 97.5])
    truth = spearman_of_normals(shared) / spearman_of_normals(shared + own)
    assert low < truth < high and high - low < 0.12
    assert script.typical(found["all"].disattenuated, range(3))[0] == pytest.approx(truth, abs=0.05)
    if same_seed:
        rho = script.correlate(script.ranked(table.columns))
        trapped = np.mean([rho[i, 3 + i] for i in range(3)])
        assert trapped > spearman_of_normals(shared) + 0.2


def first_lines(report):
    return report.split("![")[0]


@pytest.mark.parametrize("shared, own, words", (
    (0.7, 0.0, "largely agree"), (0.4, 0.4, "partly agree"), (0.0, 0.8, "do not agree")))
def test_the_report_says_what_is_so(shared, own, words, run, tmp_path, monkeypatch):
    few_samples(monkeypatch, pictures=True)
    simulate(tmp_path, shared=shared, own=own, same_seed=0.1)
    status, printed, errors = run(tmp_path, "--out", "there")
    assert status == 0, errors
    folder = tmp_path / "there/figures/cifar10-tiny"
    report = (folder / "report.md").read_text()
    answer = re.search(r"\*\*(.*)\*\*", report).group(1)
    assert answer.count(words) == 2, answer                             # with and without the static network
    assert first_lines(report).strip() in printed
    assert "the answer for early_exit, gumbel_gates, moe and token_boost stays" in report
    assert "Seeds per method: 3. n = 1,500" in report and "nan" not in report.replace("finance", "")
    pictures = re.findall(r"\((\w+\.png)\)", report)
    assert set(pictures) == {"agreement.png", "quality.png", "deciles.png", "time.png"}
    for name in pictures:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG" and (folder / name).stat().st_size > 20000
    assert "Left out: strips of images, and brightness: CIFAR-10 is not in data" in report


def test_the_sign_of_the_neurons_is_not_assumed(run, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    for flipped, answer in ((), "More"), ((FIVE[0],), "Fewer"):
        simulate(tmp_path, FIVE[:3], range(2), flipped=flipped)
        assert f"or fewer? {answer}:" in run(tmp_path)[1]
    assert "hardly agree" in (said := run(tmp_path)[1]) or "do not agree" in said or "contradict" in said
    assert "the others partly agree" in said


def test_constant_compute_is_called_constant(run, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[:4], range(2), constant=("moe",))
    status, _, errors = run(tmp_path)
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert status == 0, errors
    assert "| early_exit, moe | constant |" in report and "| 1 | constant |" in report
    assert "0.00" not in re.findall(r"^\| early_exit, moe.*$", report, re.M)[0]


def test_one_seed_leaves_reliability_unknown(run, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[1:3], [0])
    status, printed, errors = run(tmp_path)
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert status == 0, errors
    assert "the median raw rho" in printed and "Reliability is unknown" in printed
    assert "same seed, which are more alike" in printed
    assert all(row.endswith("| unknown |") for row in re.findall(r"^\| \w+ \| 0 \|.*$", report, re.M))
    assert "no relu_sparsity log" in report


def test_class_alone_is_not_agreement(run, tmp_path):
    """Costs that agree on classes and on nothing else: most of the rho is gone within classes."""
    logs = script.gather(simulate(tmp_path, FIVE[1:4], N=3000, shared=0.6, own=0.0, classes=1.0, ties=()))
    found = script.study(script.rankings(logs, lambda log: log.macs), [logs[0].label], [], None, 20)
    middle = {key: script.typical(a.raw, range(3))[0] for key, a in found.items() if key != "ceiling"}
    assert middle["all"] > 0.4 and abs(middle["within class"]) < 0.03 and abs(middle["partial"]) < 0.03
    assert middle["class alone"] == pytest.approx(middle["all"], abs=0.05) and abs(middle["shuffled"]) < 0.03


def test_right_and_wrong_apart():
    """Agreement on right answers only, and of the pairs only those of different seeds."""
    rng = np.random.default_rng(0)
    z, right = rng.standard_normal(2000), rng.random((2000, 3)) < 0.9
    right[:800] = False
    columns = np.stack([np.where(right[:, 0], z, rng.standard_normal(2000)) for _ in range(3)], 1)
    rho = script.pairs_on(columns, right, [0, 1, 0])
    both = right[:, 0] & right[:, 1]
    assert rho[0, 1] == script.spearman(columns[both, 0], columns[both, 1])
    assert np.isnan(rho[0, 2]) and np.isnan(np.diagonal(rho)).all()
    assert np.isnan(script.pairs_on(columns, np.zeros_like(right), [0, 1, 2])).all()
    table = script.Rankings(list("abc"), 3, [0, 1, 2], [0, 1, 2], {}, False, columns)
    found = script.study(table, [], [], right, 2)
    for name, keep in ("both right", right), ("both wrong", ~right):
        assert found[name].raw[0, 1] == script.pairs_on(columns, keep, [0, 1, 2])[0, 1]
    assert found["both right"].raw[0, 1] > found["both wrong"].raw[0, 1] + 0.2


def test_text_per_window_and_per_token(run, tmp_path, monkeypatch):
    few_samples(monkeypatch, pictures=True)
    simulate(tmp_path, FIVE[:4], range(2), N=400, text=True)
    status, printed, errors = run(tmp_path)
    folder = tmp_path / "figures/shakespeare-tiny"
    report = (folder / "report.md").read_text()
    assert status == 0, errors
    assert "400 windows of shakespeare" in printed and "Over 6,400 characters" in report
    assert (folder / "passages.png").stat().st_size > 50000
    assert "both right" in report.split("## Per token")[1] and "both right" not in report.split("## Per")[0]


def test_people_and_known_difficulty_are_rows(run, tmp_path, monkeypatch):
    few_samples(monkeypatch)

    def know(arrays, meta, count):
        arrays["difficulty"] = arrays["macs"].astype(np.float32) if count == 0 else known[0]
        known.append(arrays["difficulty"])
    known = []
    simulate(tmp_path, FIVE[:2], range(2), change=know)
    label = np.load(tmp_path / "early_exit-s0.npz")["label"]
    counts = np.eye(10, dtype=np.int64)[label] * 30 + np.random.default_rng(0).integers(9, size=(1500, 10))
    np.save(tmp_path / "people.npy", counts)
    status, printed, errors = run(tmp_path, "--human", tmp_path / "people.npy")
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert status == 0, errors
    assert "With people: median rho" in printed and "0.34 and 0.43" in printed
    for row in ("known difficulty | 1.00 |", "people | 0", "static loss | 0"):
        assert f"| {row}" in report


def test_a_log_of_ones_own(run, tmp_path, monkeypatch):
    """Nothing but what the README lists as needed: no token_macs, no difficulty, no clock."""
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[:2], range(2))
    simulate(tmp_path, ["my_method"], range(2), change=lambda arrays, meta, count: [
        meta.pop(key) for key in ("wall_clock", "options", "script")] and None)
    status, printed, errors = run(tmp_path)
    assert status == 0 and "early_exit and my_method" in printed, errors


@pytest.mark.parametrize("clock", ({"static_ms_batch_1": 1.0}, "fast", dict.fromkeys(
    [f"{run}_ms_batch_{batch}" for run in ("static", "skipping") for batch in (1, 256)], 0.0)), ids=str)
def test_half_a_clock_is_none(clock, run, tmp_path, monkeypatch):
    """It costs the picture of time, and nothing else."""
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[:2], range(2), change=lambda arrays, meta, count: meta.update(
        wall_clock=clock, seconds="a minute"))
    status, printed, errors = run(tmp_path)
    assert status == 0 and "Traceback" not in errors, errors
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert "no log has wall_clock" in report and "time.png" not in report


def test_what_cannot_be_told_is_left_out_by_name(run, tmp_path, monkeypatch):
    """Two methods with seed 0 only and one with two: the answer says how many pairs it is about, every
    budget is told by the same kind of rho, and no NaN is printed."""
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[1:3], [0])
    simulate(tmp_path, FIVE[:1], range(2))
    status, printed, errors = run(tmp_path)
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert status == 0 and "rankings is" in printed and "(2 of 3 pairs: " in printed, errors
    assert "| early_exit, gumbel_gates | unknown | unknown |" in report and "nan" not in report
    assert "## At other budgets\n\nRaw rho:" in report


def test_ceilings_of_opposite_rankings(run, tmp_path, monkeypatch):
    """Where rho is negative, the ceiling is the lowest that ties allow, and the share has its sign."""
    few_samples(monkeypatch)
    logs = script.gather(simulate(tmp_path, FIVE[:2], range(2), shared=0.6, flipped=FIVE[:1]))
    found = script.study(script.rankings(logs, lambda log: log.macs), [], [], None, 2)
    rho, ceiling = found["all"].raw[0, 1], found["ceiling"][0, 1]
    assert rho < -0.3 and ceiling < -0.9 and 0 < rho / ceiling < 1
    assert run(tmp_path)[0] == 0
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    row = re.search(r"relu_sparsity, early_exit \|.*", report)
    assert float(row[0].split(" | ")[3]) == pytest.approx(-rho / ceiling, abs=0.006)
    row = re.search(r"early_exit, its own seeds \(raw\) \|.*", report)
    assert float(row[0].split(" | ")[1]) == pytest.approx(found["all"].raw[1, 1], abs=0.006)


def test_words():
    """By thresholds; pairs that largely agree beside pairs that contradict each other are divided."""
    said = [script.word(rho) for rho in (0.7, 0.69, 0.15, 0.0, -0.15, -0.16, -0.4, -0.41, np.nan)]
    assert said == ["largely agree", "partly agree", "hardly agree", "do not agree", "do not agree",
                    "weakly contradict each other", "weakly contradict each other", "contradict each other",
                    "cannot be compared yet"]
    assert script.word(0.8, -0.5, 0.9) == script.word(np.nan, -0.5, 0.9) == "are divided"
    assert script.word(0.696) == "largely agree" and script.word(-0.1504) == "do not agree"     # as printed
    assert script.word(0.2, -0.9, 0.698) == "are divided"
    assert script.word(0.8, -0.3, 0.9) == "largely agree" and script.word(0.2, -0.5, 0.6) == "hardly agree"


def test_logs_of_other_epochs_are_refused_whichever_comes_first(tmp_path):
    """A method of one's own that says nothing of epochs sorts first, and decides nothing."""
    epochs = iter((None, 2, 3))

    def change(arrays, meta, count):
        meta["options"] = dict(epochs=next(epochs))

    paths = simulate(tmp_path, ["brightness", *FIVE[1:3]], [0], change=change)
    with pytest.raises(script.UserError, match="number of epochs is not that of .*early_exit-s0"):
        script.gather(paths)


def test_blocks_of_neighbours_widen_intervals():
    """Sums of ten neighbours are nearly the same for neighbours: the sample holds fewer examples."""
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((1610, 2)).cumsum(0)
    columns = columns[10:] - columns[:-10]
    widths = [np.std([rho[0, 1] for rho in script.bootstrap(columns, 200, block)]) for block in (1, 16)]
    assert widths[1] > 1.8 * widths[0]
    assert np.isfinite(next(script.bootstrap(columns[:30], 1, 16))).all()       # ten blocks at least


def test_without_reliability_it_says_why(run, tmp_path, monkeypatch):
    """Two seeds of each, which have nothing in common: there are seeds enough, but they do not agree."""
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[1:3], range(2), shared=0.0, own=0.0)
    monkeypatch.setattr(script, "correlate", lambda columns: np.eye(columns.shape[1]) * 1.2 - 0.2)
    assert "Reliability is not above 0: seeds of one method do not agree" in run(tmp_path)[1]


def test_costs_of_characters_do_not_overflow(tmp_path):
    """Costs of the default size on a GPU, 256 characters of 11,845,632 MACs each, are 1 of the dense."""
    T, dense = 256, 256 * 11_845_632
    meta = dict(dataset="shakespeare", size="base", name="relu_sparsity", seed=0, static_macs=dense)
    tokens = np.full((20, T), dense // T, np.int32)
    tokens[:, 0] -= 1000
    values = dict(views=np.ones((5, 20)), curve=np.ones((2, 3)), quality=1.0, right=tokens > 0,
                  label=np.full((20, T), 97), loss=np.ones((20, T)), tokens=tokens)
    logs = [script.Log(None, dict(meta, name=method), **values) for method in FIVE[:2]]
    _, _, panels = script.per_token(logs, script.rankings(logs, lambda log: log.macs))
    costs = [cost for _, _, costs in panels for cost in costs]
    assert costs and np.nanmin(costs) > 0.99 and np.nanmax(costs) <= 1


def test_seeds_that_do_not_agree_are_named(run, tmp_path, monkeypatch):
    few_samples(monkeypatch)
    simulate(tmp_path, FIVE[:2], range(3), shared=0.6, own=0.3)
    simulate(tmp_path, FIVE[2:3], range(3), shared=0.0, own=0.0)
    assert "Not all seeds of gumbel_gates agree with one another" in run(tmp_path)[1]


def test_spread_and_what_cannot_be_told():
    assert script.spread([0.5]) == "0.50" and script.spread([-0.001, 0.001]) == "0.00 (0.00 to 0.00)"
    assert script.spread([np.nan, 1]) == "unknown" == script.between(np.nan, 0, 1)
    assert script.between(0.5, np.nan, 1) == "0.50"
    assert script.between(0.5, 0, 1, 1, "[]") == "0.5 [0.0 to 1.0]"


# --- Refusals -----------------------------------------------------------------------------------------------

def break_log(what):
    """A change to the second of two logs; returns "skip" where that log is not written at all."""
    def change(arrays, meta, count):
        if count == 0:
            meta["options"] = dict(epochs=2, lr=0.003)
            return None
        N = len(arrays["macs"])
        if what == "split":
            meta["test_sha256"] = "1" * 64
        elif what == "data set":
            meta["dataset"] = "shapes"
        elif what == "permuted":
            order = np.random.default_rng(3).permutation(N)
            for key in ("label", "prediction", "loss", "macs"):
                arrays[key] = arrays[key][order]
        elif what == "schema":
            meta["schema"] = 1
        elif what == "epochs":
            meta["options"] = dict(epochs=3)
        elif what == "budget of 0":
            meta["static_macs"] = 0
        elif what == "elsewhere":
            meta["dataset"] = "../../elsewhere"
        elif what == "another recipe":
            meta.update(name="relu_sparsity", seed=1, options=dict(epochs=2, lr=0.1))
        elif what == "missing":
            del arrays["sweep_macs"], meta["static_macs"]
        elif what == "shape":
            arrays["loss"] = arrays["loss"][:-1]
        elif what == "fewer":
            for key, a in arrays.items():
                arrays[key] = a[..., :-1] if a.shape[-1] == N else a
        elif what == "NaN":
            arrays["loss"][7] = np.nan
        elif what == "words":
            arrays["loss"] = arrays["loss"].astype(str)
        elif what == "one method":
            meta["name"], meta["seed"] = "relu_sparsity", 5
        elif what == "twice":
            meta["name"] = "relu_sparsity"
    return change


@pytest.mark.parametrize("what, message", (
    ("split", "its test split is not that of"), ("data set", "(cifar10, not shapes)"),
    ("permuted", "order of labels is not that of"),
    ("schema", "unknown schema"), ("epochs", "number of epochs is not that of"), ("missing", "static_macs, sweep_macs"),
    ("budget of 0", "of the wrong kind"), ("elsewhere", "of the wrong kind"),
    ("another recipe", "was trained with lr 0.003, not 0.1 as "), ("shape", "loss has shape"), ("fewer", "examples is not that of"), ("NaN", "loss holds NaN"),
    ("words", "loss is not numeric"), ("one method", "at least two"), ("twice", "the same method and seed")))
def test_refusals(what, message, run, tmp_path):
    simulate(tmp_path, FIVE[:2], [0], change=break_log(what))
    status, printed, errors = run(tmp_path)
    assert status == 2 and errors.count("\n") == 1 and printed == ""
    assert errors.startswith("compare_rankings.py: ") and message in errors and "-s0.npz" in errors


def broken_files(folder):
    simulate(folder, FIVE[:1], [0])
    log = (folder / "relu_sparsity-s0.npz").read_bytes()
    (folder / "text.npz").write_text("not a log")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "short.npz").write_bytes(log[:len(log) // 2])
    (folder / "altered.npz").write_bytes(log[:2000] + bytes(len(log) - 4000) + log[-2000:])
    np.save(folder / "array.npy", np.arange(5))
    np.savez(folder / "other.npz", x=np.arange(5))
    np.savez(folder / "objects.npz", meta=np.array([{}], object))
    np.savez(folder / "list.npz", meta="[1]")


@pytest.mark.parametrize("name, message", (
    ("text.npz", "is no log"), ("empty.npz", "is no log"), ("short.npz", "is no log"),
    ("altered.npz", "is no log"), ("array.npy", "is no log"), ("objects.npz", "is no log"),
    ("other.npz", "'meta' is missing"), ("list.npz", "unknown schema"), ("nowhere.npz", "no such file")))
def test_files_that_are_no_logs(name, message, run, tmp_path):
    broken_files(tmp_path)
    status, _, errors = run(tmp_path / "relu_sparsity-s0.npz", tmp_path / name)
    assert status == 2 and errors.count("\n") == 1 and message in errors and name in errors


@pytest.mark.parametrize("counts, message", (
    (np.ones((1500, 9), int), "(1500, 9)"), (np.ones((1499, 10), int), "(1499, 10)"),
    (np.ones(15000), "no array"), (np.zeros((1500, 10), int), "nobody"),
    (np.eye(10)[np.arange(1500) % 10] * 50, "official order")))
def test_people_of_another_shape_are_refused(counts, message, run, tmp_path):
    simulate(tmp_path, FIVE[:2], [0])
    np.save(tmp_path / "people.npy", counts)
    status, _, errors = run(tmp_path, "--human", tmp_path / "people.npy")
    assert status == 2 and errors.count("\n") == 1 and message in errors and "people.npy" in errors


@pytest.mark.parametrize("options, message", (
    (["--nonsense"], "unrecognized"), (["--train", "--seeds", "0"], "at least 1"),
    (["--jobs", "many"], "invalid int"), (["--train", "--dataset", "mnist"], "mnist"),
    (["--train", "--budget", "7"], "budget"), (["empty"], "no logs")))
def test_bad_options(options, message, run, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, errors = run(*options)
    assert status == 2 and errors.count("\n") == 1 and message in errors


def test_without_arguments_it_says_what_to_do(run, tmp_path):
    status, printed, _ = run()
    assert status == 0 and "There are no logs yet" in printed
    assert "--train --dataset shapes --size small --seeds 2" in printed
    (tmp_path / "logs/cifar10-tiny").mkdir(parents=True)
    simulate(tmp_path / "logs/cifar10-tiny", FIVE[:2], range(2), N=50)
    assert "logs/cifar10-tiny: early_exit-s0, early_exit-s1, relu_sparsity-s0, relu_sparsity-s1" in run()[1]
    assert "python compare_rankings.py logs/cifar10-tiny" in run()[1]


def test_help_explains_every_option(run):
    status, printed, _ = run("--help")
    assert status == 0 and script.__doc__.split("\n")[0] in printed
    for option in re.findall(r'add\("--(\w+)"', (ROOT / "compare_rankings.py").read_text()):
        assert re.search(rf"--{option}( |\n)[^-]*[a-z]{{3}}", printed), option


# --- Training what is missing -------------------------------------------------------------------------------

def test_static_networks_are_a_table_and_no_rankings(run, tmp_path, monkeypatch):
    """Alone they make a report of their own; beside methods they are no methods."""
    few_samples(monkeypatch)

    def small(arrays, meta, count):
        if count % 2:
            meta.update(name="depth_1", static_macs=DENSE // 2, seconds=90.0)
            meta["options"] = dict(meta["options"], depth=1)

    simulate(tmp_path, FIVE[:1] * 2, [0], change=small)
    for path in tmp_path.glob("*.npz"):                     # the second stands in the first one's place
        path.rename(tmp_path / "depth_1-s0.npz")
    simulate(tmp_path, FIVE[:1], [0, 1])
    status, printed, errors = run(tmp_path)
    assert status == 0, errors
    assert "| relu_sparsity | 32 | 2 | 1.00 M | 1.00 | unknown | 0, 1 |" in printed
    assert "| depth_1 | 32 | 1 | 0.50 M | 0.50 | 1.5 | 0 |" in printed
    simulate(tmp_path, FIVE[1:2], [0, 1])
    status, printed, _ = run(tmp_path)
    report = (tmp_path / "figures/cifar10-tiny/report.md").read_text()
    assert status == 0 and "relu_sparsity and early_exit" in printed and "depth_1" not in printed
    assert "| depth_1 | 32 | 1 | 0.50 M | 0.50 | 1.5 | 0 |" in report


def test_train_from_nothing_and_resume(run, tmp_path):
    """What is missing, and no more; other options are refused."""
    options = ("--train", "--dataset", "pydoc", "--size", "tiny", "--seeds", 1, "--device", "cpu")
    status, printed, errors = run(*options, "--steps", 5)
    logs = tmp_path / "logs/pydoc-tiny"
    assert status == 0, errors
    assert {path.name for path in logs.glob("*.npz")} == {f"{name}-s0.npz" for name in NAMES}
    assert "runs:" in errors and "Traceback" not in errors                          # the bar of the runs,
    assert "relu_sparsity, seed 0: " in errors                                      # and those below it
    report = (tmp_path / "figures/pydoc-tiny/report.md").read_text()
    assert "| relu_sparsity | 32 | 2 |" in report and all(name in report for name in NAMES)
    (logs / "moe-s0.npz").unlink()
    kept = (logs / "relu_sparsity-s0.npz").stat().st_mtime_ns
    assert run(*options, "--steps", 5)[0] == 0 and (logs / "moe-s0.npz").exists()
    assert (logs / "relu_sparsity-s0.npz").stat().st_mtime_ns == kept                # and not again
    status, _, errors = run(*options, "--steps", 6)
    assert status == 2 and errors.count("\n") == 1
    assert "relu_sparsity-s0.npz: was trained with steps 5, not 6" in errors


SLEEPER = """
import argparse, time
def options(argv):
    return argparse.Namespace(dataset="pydoc", size="tiny", device="cpu")
if __name__ == "__main__":
    print("child", flush=True)
    time.sleep(100)
"""


def test_stopping_with_ctrl_c(tmp_path):
    """In a process of its own, while a child runs: exit status 130, and the child ends too."""
    (tmp_path / "compare_rankings.py").write_bytes((ROOT / "compare_rankings.py").read_bytes())
    (tmp_path / f"{FIVE[0]}.py").write_text(SLEEPER)
    process = subprocess.Popen([sys.executable, "compare_rankings.py", "--train", "--dataset", "pydoc"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = b""
    while b"child" not in said:
        said += os.read(process.stderr.fileno(), 4096)
        assert process.poll() is None, said
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)         # returns when the child has closed its end, too
    assert process.returncode == 130 and b"Traceback" not in said + errors
    assert errors.endswith(b"compare_rankings.py: stopped\n")


def test_strips_show_the_images_of_the_logs(run, tmp_path, monkeypatch):
    """Images only where their checksum is that of the logs."""
    few_samples(monkeypatch, pictures=True)
    data = scripts[NAMES[0]].load_data(configure(scripts[NAMES[0]]))
    digest = hashlib.sha256(data["test"][0].numpy().tobytes() + data["test"][1].numpy().tobytes())

    def real(arrays, meta, count):
        meta.update(dataset="shapes", test_sha256=digest.hexdigest())
        arrays.update(label=data["test"][1].numpy(), difficulty=data["difficulty"])
    simulate(tmp_path, FIVE[:3], range(2), N=4000, change=real)
    status, _, errors = run(tmp_path)
    report = (tmp_path / "figures/shapes-tiny/report.md").read_text()
    assert status == 0 and "strips.png" in report and "Left out" not in report, errors
    assert (tmp_path / "figures/shapes-tiny/strips.png").stat().st_size > 100000
    log = script.load(tmp_path / "early_exit-s0.npz")
    images, names = script.test_images(log, tmp_path)
    assert np.array_equal(images, data["test"][0].numpy()) and len(names) == 10
    log.meta["test_sha256"] = "0" * 64
    with pytest.raises(script.UserError, match="not what the logs are about"):
        script.test_images(log, tmp_path)
