"""Do different dynamic networks agree on which examples are hard?

The other scripts log the MACs that every test example took. This one ranks the examples by them,
one ranking per network, and asks two things:

    Does a mechanism pay?   Its quality at a budget, beside static networks of as many MACs, beside
                            its own decisions dealt out at random, and beside the full static one.
    Do they agree?          Spearman's rho, the correlation of ranks, of every pair of rankings.

    python compare_rankings.py logs/cifar10-small           # a folder, or any list of log files
    python compare_rankings.py --train --dataset shapes --size tiny --seeds 2      # from nothing
    python compare_rankings.py logs/cifar10-small --human cifar10h-counts.npy      # and people

Out come `figures/<dataset>-<size>/report.md`, answer first, and pictures. Equal MACs share a rank,
which limits rho: two networks that order examples alike, of which one lets half leave early and one
90 %, cannot exceed 0.33. Runs of one seed see the same batches: different seeds are compared, where
two methods have any.
"""
import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

STATIC = "relu_sparsity"        # trains static networks; a method of its own, without a budget
METHODS = (STATIC, "early_exit", "gumbel_gates", "moe", "token_boost")
TEXTS = ("shakespeare", "pydoc")
BUDGETS = (0.35, 0.5, 0.6, 0.7, 0.85)       # of the sweeps, shares of the static network's MACs
WORDS = {0.7: ("strong", "agree strongly"), 0.4: ("moderate", "agree moderately"),
         0.2: ("weak", "agree weakly"), -0.2: ("none", "do not agree"),
         -np.inf: ("opposite", "tend to opposite orders")}      # of a rho of at least so much
FLOOR = 0.3         # two lower reliabilities would more than triple rho, and its error
NEIGHBOURS = 16     # windows of a text that the bootstrap keeps together, as neighbours are alike
Ranking = namedtuple("Ranking", "name seed costs")      # costs (N,); seed None: there are no seeds

def fail(message):
    """End the program with one line and exit status 2."""
    print(f"compare_rankings.py: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


# === logs ===
class Log:
    """A run on N test examples, in a text of T characters each, and a sweep over S budgets."""

    def __init__(self, path):
        self.path = path
        try:
            self.read()
            self.check()
            self.derive()
        except Exception as error:      # a file that is something else can fail in a dozen ways
            fail(f"{path}: is not a log ({type(error).__name__}: {error})")

    def read(self):
        with np.load(self.path, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.name = self.meta["name"]
        self.seed = self.meta["seed"]
        self.text = self.meta["dataset"] in TEXTS
        self.same = [self.meta[key] for key in ("dataset", "size", "test_sha256")]
        self.static_macs = self.meta["static_macs"]

    def check(self):
        """Raise an error if something is of the wrong kind."""
        numbers = type(self.seed) is int and 0 < self.static_macs < 1e30
        if self.meta["schema"] != 3 or not numbers:
            raise ValueError("unknown schema, or seed or static_macs of the wrong kind")
        if any(Path(word).name != word for word in (self.name, *self.same)):
            raise ValueError("a name that contains a folder")
        N = len(self.arrays["macs"])
        S = len(self.arrays["sweep_macs"])
        if N < 10 or S < 1:
            raise ValueError("fewer than 10 examples, or no sweep")
        each = (N, self.arrays["label"].size // N) if self.text else (N,)
        shapes = dict(label=each, prediction=each, loss=each, macs=(N,), sweep_macs=(S, N),
                      sweep_loss=(S, N), sweep_correct=(S, N), difficulty=(N,), token_macs=each)
        for key in shapes.keys() & self.arrays.keys():      # what is missing will be missed
            array = self.arrays[key]
            if array.shape != shapes[key]:
                raise ValueError(f"{key} has shape {array.shape}, {shapes[key]} is expected")
            if array.dtype.kind not in "biuf" or not np.isfinite(array).all() or array.min() < 0:
                raise ValueError(f"{key} holds NaN, infinity, something below 0, or no numbers")

    def derive(self):
        """What the report needs; MACs become shares of the static network's."""
        self.label = self.arrays["label"]
        self.right = self.arrays["sweep_correct"][-1]           # (N,), by the full model
        self.loss = self.arrays["loss"].astype(float).reshape(len(self.label), -1).mean(1)
        self.macs = self.arrays["macs"] / self.static_macs                      # (N,)
        self.sweep_macs = self.arrays["sweep_macs"] / self.static_macs          # (S, N)
        self.spent = self.sweep_macs.mean(1)                                    # (S,)
        quality = self.arrays["sweep_loss" if self.text else "sweep_correct"]
        self.quality = quality.astype(float).mean(1)            # (S,)
        better = "loss" if self.text else "accuracy"
        dealt = self.meta.get("random", [{}] * len(self.spent))
        self.random = [run.get(better, np.nan) if abs(run.get("budget", macs) - macs) < 0.03
                       else np.nan for run, macs in zip(dealt, self.spent, strict=True)]    # (S,)
        clock = self.meta.get("wall_clock", {})
        self.time = [clock.get(f"skipping_ms_batch_{batch}", np.nan)
                     / clock.get(f"static_ms_batch_{batch}", np.nan) for batch in (1, 256)]
        self.kind = "full" if self.name == STATIC else "method"
        if self.meta.get("script") == STATIC != self.name:      # smaller, or penalised
            self.kind = "method" if self.meta.get("sparsity_weight") else "smaller"

    def point(self, budget):
        """The point of the sweep that spends a budget, to 0.03, or None."""
        nearest = abs(self.spent - budget).argmin()
        return nearest if abs(self.spent[nearest] - budget) < 0.03 else None

def gather(paths):
    """Files and folders -> their logs, which are about the same examples, by method and seed."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        fail(f"{', '.join(map(str, paths))}: no logs (.npz)")
    logs = [Log(path) for path in {path.resolve(): path for path in files}.values()]
    seen = {}
    for log in logs:
        if log.same != logs[0].same or not np.array_equal(log.label, logs[0].label):
            fail(f"{log.path}: data set, size, test split or its order differ from {files[0]}")
        if (log.name, log.seed) in seen:
            fail(f"{log.path}: the same method and seed as {seen[log.name, log.seed].path}")
        seen[log.name, log.seed] = log
    recipes = {log.meta["epochs"]: log.path for log in logs if "epochs" in log.meta}
    if len(recipes) > 1:
        fail(f"{' and '.join(map(str, recipes.values()))}: epochs differ")
    runs = by_method([seen[key] for key in sorted(seen)])
    return [log for name in dict.fromkeys([*METHODS, *runs]) for log in runs.get(name, [])]

def by_method(runs):
    """{name: its runs}, of a list of logs or rankings."""
    return {run.name: [other for other in runs if other.name == run.name] for run in runs}


# === statistics ===
def midranks(x):
    """x (N,) -> ranks from 1 to N, equal values sharing the mean of theirs."""
    _, code, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[code]     # the last rank of a value, less half

def correlate(columns):
    """columns (N, L) -> Spearman's rho (L, L): Pearson's of midranks; NaN where one is constant."""
    return np.corrcoef(np.stack([midranks(x) for x in columns.T], 1), rowvar=False)

def within_class(columns, label, least=30):
    """Mean (L, L) of rho over the classes of at least so many examples, where it is defined."""
    names, counts = np.unique(label, return_counts=True)
    each = np.array([correlate(columns[label == name]) for name in names[counts >= least]])
    return np.nanmean(each, 0) if len(each) else np.full(2 * columns.shape[1:], np.nan)

def top_overlap(columns, k):
    """Share (L, L) of the k costliest that two columns have in common; ties share last places."""
    last = np.sort(columns, axis=0)[-k]
    above = columns > last
    equal = columns == last
    member = above + equal * (k - above.sum(0)) / equal.sum(0)
    return member.T @ member / k

def bootstrap(columns, resamples=300, block=1):
    """rho (resamples, L, L) of rows drawn with replacement, in blocks of neighbours."""
    rng = np.random.default_rng(0)
    block = min(block, len(columns) // 10)
    blocks = len(columns) // block
    rho = []
    for _ in range(resamples):
        first = block * rng.integers(blocks, size=blocks)
        rho.append(correlate(columns[(first[:, None] + np.arange(block)).ravel()]))
    return np.stack(rho)

def agreement(rho, rankings, floor=FLOOR):
    """rho (..., L, L) of runs -> raw and disattenuated rho (..., A, A) of methods. Raw: the mean
    over pairs of runs, of different seeds if there are any; the diagonal, between the seeds of a
    method, is its reliability, NaN with one seed. Disattenuated: over the root of the product of
    two reliabilities, and at most 1; NaN where one is unknown or not above the floor."""
    names = np.array([ranking.name for ranking in rankings])
    seeds = np.array([ranking.seed for ranking in rankings])
    methods = list(by_method(rankings))
    raw = np.full((*rho.shape[:-2], len(methods), len(methods)), np.nan)
    for a, b in np.ndindex(raw.shape[-2:]):
        both = (names == methods[a])[:, None] & (names == methods[b])
        apart = both & (seeds[:, None] != seeds)
        if a != b or apart.any():
            raw[..., a, b] = rho[..., apart if apart.any() else both].mean(-1)
    exact = np.array(methods) == "known difficulty"
    raw[..., exact, exact] = 1.0       # without error
    reliability = np.diagonal(raw, axis1=-2, axis2=-1)
    root = np.sqrt(np.where(reliability > floor, reliability, np.nan))
    return raw, np.clip(raw / (root[..., :, None] * root[..., None, :]), -1, 1)

def study(rankings, label=None, resamples=300):
    """All that is told of pairs of methods, {what: (A, A)}. label (N,): classes, None in a text."""
    columns = np.stack([ranking.costs for ranking in rankings], 1)
    raw, full = agreement(correlate(columns), rankings)
    samples = bootstrap(columns, resamples, NEIGHBOURS if label is None else 1)
    interval = np.percentile(agreement(samples, rankings, floor=0)[1], [2.5, 97.5], axis=0)
    interval[:, np.isnan(full)] = np.nan
    found = dict(raw=raw, disattenuated=full, low=interval[0], high=interval[1])
    found["ceiling"] = agreement(correlate(np.sort(columns, axis=0)), rankings)[0]
    found["top"] = agreement(top_overlap(columns, len(columns) // 10), rankings)[0]
    if label is not None:
        found["within"] = agreement(within_class(columns, label), rankings)[1]
    return found


# === does it pay? ===
def frontier(logs, macs):
    """What static networks of so many MACs reach, by linear interpolation between narrower ones and
    between shallower ones, the better of the two; NaN beyond the smallest and the full one."""
    full = [log for log in logs if log.kind == "full"]
    found = []
    for fixed in ("width", "depth") if full else ():
        alike = full + [log for log in logs if log.kind == "smaller"
                        and log.meta[fixed] == full[0].meta[fixed]
                        and log.static_macs < full[0].static_macs]
        points = sorted((runs[0].static_macs, np.mean([log.quality[-1] for log in runs]))
                        for runs in by_method(alike).values())
        if len(points) > 1 and 0.97 * points[0][0] < macs < 1.03 * points[-1][0]:
            found.append(np.interp(macs, *zip(*points)))
    return (min if logs[0].text else max)(found, default=np.nan)

def verdict(quality, static, dealt, full, text):
    """Whether it pays, in words: qualities (seeds,) at a budget, and what they must exceed."""
    sign = -1 if text else 1            # of a loss, less is better
    near = 0.01 if text else 0.003
    reasons = {"not better than static networks": (sign * (quality - static) <= 0).any(),
               "not better than random decisions": (sign * (quality - dealt) <= 0).any(),
               "worse than the full network": sign * (quality.mean() - full) < -near}
    failed = [reason for reason, true in reasons.items() if true]               # never so with NaN
    if not failed and np.isnan([*static, *dealt, full]).any():
        return "unknown: something to compare with is missing"
    return f"no: {', '.join(failed)}" if failed else "yes"

def paying_table(logs):     # a row for each method and budget
    full = np.mean([log.quality[-1] for log in logs if log.kind == "full"] or [np.nan])
    methods = by_method([log for log in logs if log.kind == "method"])
    rows = []
    for (name, runs), budget in itertools.product(methods.items(), BUDGETS):
        points = [log.point(budget) for log in runs]
        if None in points:
            continue                            # out of reach for a seed
        spent, quality, dealt = np.array([(log.spent[k], log.quality[k], log.random[k])
                                          for log, k in zip(runs, points)]).T
        static = np.array([frontier(logs, share * runs[0].static_macs) for share in spent])
        rows.append([name, str(len(runs)), spread(spent, 3), spread(quality, 4), spread(static, 4),
                     spread(dealt, 4), number(full, 4),
                     verdict(quality, static, dealt, full, logs[0].text)])
    return markdown(["method", "seeds", "MACs, share of static",
                     "test loss, nats" if logs[0].text else "test accuracy",
                     "static networks of as many MACs (interpolated)", "its decisions at random",
                     "full static network", "does it pay?"], rows)


# === the report ===
def number(x, digits=2):
    return "unknown" if np.isnan(x) else f"{round(float(x), digits) + 0.0:.{digits}f}"   # no -0.00

def spread(values, digits=2):
    """Mean (lowest to highest)."""
    mean, low, high = (number(x, digits) for x in (np.mean(values), np.min(values), np.max(values)))
    return mean if len(values) == 1 or mean == "unknown" else f"{mean} ({low} to {high})"

def markdown(header, rows):
    """Strings -> the lines of a Markdown table, and an empty one; nothing without rows."""
    return [] if not rows else ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]

def word(rho, form=0):
    """What a rho is called, as it is printed: in a word, or (form=1) as a predicate."""
    said = [said[form] for least, said in WORDS.items() if round(float(rho), 2) >= least]
    return said[0] if said else "unknown"

def headline(methods, found, scripts):
    """What rankings do, in words: by disattenuated rho, or by raw rho where no other is known. Two
    variants of one script {method: script} are not two types of network."""
    pairs = list(itertools.combinations(range(len(methods)), 2))
    pairs = [(a, b) for a, b in pairs if scripts[methods[a]] != scripts[methods[b]]] or pairs
    known = [pair for pair in pairs if np.isfinite(found["disattenuated"][pair])]
    kind = "disattenuated" if known else "raw"
    rho = [found[kind][pair] for pair in known or pairs]
    names = [methods[i] for i in sorted(set(itertools.chain(*(known or pairs))))]
    return (f"the rankings by compute of {', '.join(names[:-1])} and {names[-1]} "
            f"{word(np.mean(rho), 1)}: mean {kind} rho {spread(rho)}, "
            f"{len(rho)} of {len(pairs)} pairs")

def pair_table(rankings, found):
    """A row for each pair of methods, and of a method and another measure."""
    rows = []
    for (a, first), (b, second) in itertools.combinations(enumerate(by_method(rankings)), 2):
        cell = {what: number(rho[a, b]) for what, rho in found.items()}
        interval = f" [{cell['low']} to {cell['high']}]" if cell["low"] != "unknown" else ""
        reliabilities = f"{number(found['raw'][a, a])}, {number(found['raw'][b, b])}"
        rows.append([f"{first} and {second}", word(found["disattenuated"][a, b]),
                     cell["disattenuated"] + interval, cell["raw"], reliabilities,
                     cell["ceiling"], cell.get("within", "-"), cell["top"]])
    return markdown(["pair", "agreement", "disattenuated rho [95 %]", "raw rho", "reliabilities",
                     "ceiling by ties", "within classes", "costliest 10 % shared"], rows)

HOW_TO_READ = f"""
## How to read this

Agreement: {', '.join(f'{said[0]} from {least}' for least, said in WORDS.items())}.

* *Disattenuated*: raw rho over the root of the product of both reliabilities, the rho between seeds
  of one method. Unknown if one is {FLOOR} or less: two such would more than triple rho and its
  error. Estimates above 1 are noise, and shown as 1. The interval is over examples, not over seeds.
* *Ceiling by ties*: the highest raw rho possible. *Costliest 10 % shared*: by chance 0.10.
* *It pays*, in MACs, if each seed is better than static networks of as many MACs (narrower and
  shallower ones, interpolated) and than its own decisions dealt out at random, and the mean is
  within 0.3 points, or 0.01 nats, of the full static network. Time is another matter.
""".replace("opposite from -inf", "opposite below").strip().splitlines()


# === pictures ===
def canvas(title, width, height, rows=1, columns=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)

def draw_agreement(rankings, found):
    methods = list(by_method(rankings))
    A = len(methods)
    figure, [[axis]] = canvas("rho; above, disattenuated", 4 + A, 3 + 0.8 * A)
    shown = np.where(np.tri(A, dtype=bool), found["raw"], found["disattenuated"])
    axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.75)
    for (i, j), rho in np.ndenumerate(shown):
        axis.text(j, i, number(rho), ha="center", va="center")
    axis.set_xticks(range(A), methods, rotation=30, ha="right")
    axis.set_yticks(range(A), methods)
    return figure

def draw_quality(logs):
    figure, [[axis]] = canvas("what compute buys; dashed: the same decisions at random", 9, 6)
    methods = by_method([log for log in logs if log.kind == "method"])
    for i, (name, runs) in enumerate(methods.items()):
        for log in runs:
            label = name if log is runs[0] else None
            axis.plot(log.spent, log.quality, f"C{i % 10}o-", ms=3, label=label)
            axis.plot(log.spent, log.random, f"C{i % 10}--")
    for macs in {log.static_macs for log in logs if log.kind == "full"}:
        static = [frontier(logs, share * macs) for share in np.linspace(0.2, 1, 100)]
        axis.plot(np.linspace(0.2, 1, 100), static, "k", lw=2, label="static networks")
    axis.set(xlabel="mean MACs, share of the static network's",
             ylabel="test loss, nats per character" if logs[0].text else "test accuracy")
    axis.legend()
    return figure

def draw_deciles(rankings, measures):
    """By the first of the measures, a line for each method; means of seeds."""
    figure, [[axis]] = canvas("what easy and hard examples cost", 8, 5)
    name, columns = next(iter(by_method(measures).items()))
    hardness = np.mean([column.costs for column in columns], 0)
    deciles = np.array_split(hardness.argsort(kind="stable"), 10)
    for method, runs in by_method(rankings).items():
        costs = np.mean([run.costs for run in runs], 0)
        axis.plot(range(1, 11), [costs[decile].mean() for decile in deciles], "o-", label=method)
    axis.set(xlabel=f"decile, easy to hard by {name}", ylabel="MACs, share of static")
    axis.legend()
    return figure

def draw_images(logs, images, count=6):
    """Of one class: a row for each method, the cheapest on the left, the costliest on the right."""
    methods = by_method(logs)
    members = np.flatnonzero(logs[0].label == 4)        # deer, or flowers with five lobes
    figure, axes = canvas("images of one class, from cheap to costly, with their share of the MACs",
                          2.6 * count, 1.5 * len(methods), len(methods), 2 * count)
    for row, (name, runs) in zip(axes, methods.items()):
        macs = np.mean([log.macs for log in runs], 0)[members]
        order = macs.argsort(kind="stable")
        for axis, i in zip(row, [*order[:count], *order[-count:]]):
            axis.imshow(images[members[i]].transpose(1, 2, 0))
            axis.set_title(f"{macs[i]:.3f}", fontsize=8)
            axis.axis("off")
        row[0].text(-4, 16, name, rotation=90, ha="right", va="center")
    return figure

def draw_passage(logs):
    """The window of a text that methods see most unevenly; darker: more MACs."""
    methods = by_method(logs)
    label = logs[0].label
    T = min(64, label.shape[1])
    ranks = np.stack([midranks(np.mean([log.arrays["token_macs"] for log in runs], 0).ravel())
                      for runs in methods.values()]).reshape(-1, *label.shape)
    i = ranks.std((0, 2)).argmax()
    read = np.append(32, label)[:-1].reshape(label.shape)[i]    # windows join up
    figure, [[axis]] = canvas(f"window {i}: the characters on which each method spends", 14, 4)
    axis.imshow(ranks[:, i, :T], cmap="Blues", aspect="auto", alpha=0.7)
    for m, t in np.ndindex(len(methods), T):
        sign = chr(read[t]).replace("\n", "↵").replace("$", r"\$")
        axis.text(t, m, sign, ha="center", va="center", family="monospace", fontsize=8)
    axis.set_yticks(range(len(methods)), methods)
    return figure

def draw_time(logs):
    methods = by_method(logs)
    shares = np.array([np.mean([[log.macs.mean(), *log.time] for log in runs], 0)
                       for runs in methods.values()])           # (methods, 3)
    figure, [[axis]] = canvas("MACs and time, shares of the static network's", 11, 5)
    for k, label in enumerate(("MACs", "time, batch of 1", "time, batch of 256")):
        bars = axis.bar(np.arange(len(methods)) + 0.27 * (k - 1), shares[:, k], 0.25, label=label)
        axis.bar_label(bars, [number(share) for share in shares[:, k]])
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(methods)), methods)
    axis.legend()
    return figure


# === comparing ===
def test_images(log, folder):
    """The test images of a log, uint8 (N, 3, 32, 32); None where a download would be needed."""
    dataset = log.same[0]
    here = dataset == "cifar10" and Path(folder, "cifar-10-batches-bin").exists()
    if dataset != "shapes" and not here:
        return None
    script = importlib.import_module(STATIC)
    flags = [f"--dataset={dataset}", f"--data={folder}", "--size=tiny", "--device=cpu"]
    images, label = script.load_data(script.options(flags))["test"]
    return images.numpy() if np.array_equal(label, log.label) else None

def doubt_of_people(path, log):
    """Counts (N, 10) of how people labelled each test image -> their entropy in nats (N,)."""
    try:
        counts = np.load(path, allow_pickle=False).astype(float)
    except Exception as error:          # no file, or one that is something else
        fail(f"{path}: is no array of counts, .npy ({error})")
    if log.meta["dataset"] != "cifar10" or counts.shape != (len(log.macs), 10):
        fail(f"{path}: --human takes counts {(len(log.macs), 10)} for cifar10, not {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum(1).min() < 1:
        fail(f"{path}: holds NaN, negative counts, or images that nobody labelled")
    if (counts.argmax(1) == log.label).mean() < 0.5:
        fail(f"{path}: people agree with fewer than half of the labels: not in the official order?")
    p = counts / counts.sum(1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)

def rank(logs, examples=slice(None), budget=None):
    """Rankings by MACs at a budget, or at the chosen thresholds; a line on runs that have none."""
    rankings = [Ranking(log.name, log.seed, log.sweep_macs[log.point(budget)][examples]
                        if budget and log.kind == "method" else log.macs[examples]) for log in logs]
    flat = [f"{each.name}-s{each.seed}" for each in rankings if np.ptp(each.costs) == 0]
    lines = [f"MACs are constant, and rank nothing: {', '.join(flat)}.", ""] if flat else []
    return [each for each in rankings if np.ptp(each.costs) > 0], lines

def telling_tables(logs):
    """The pairs at three budgets, of runs that reach them, on examples neither trivial nor
    impossible: on others networks cannot differ in being right (Meding et al. 2022)."""
    right = np.array([log.right for log in logs if log.kind == "full"])
    telling = np.ones(len(logs[0].macs), bool)
    if len(right) > 1:                          # one network alone is right or wrong everywhere
        telling = (right.min(0) < 1) & (right.max(0) > 0)
    lines = [f"{telling.sum():,} of {len(telling):,} examples are neither trivial nor impossible "
             f"(right in all {len(right)} full static networks, or in none; it takes two).", ""]
    for budget in (0.35, 0.5, 0.7) if telling.sum() >= 30 else ():
        reach = [log for log in logs if log.kind == "full" or log.point(budget) is not None]
        rankings, constant = rank(reach, telling, budget)
        if len(by_method(rankings)) > 1:
            found = study(rankings, None if logs[0].text else logs[0].label[telling])
            lines += [f"These, at {budget} of the MACs ({STATIC}: at its own):", "", *constant,
                      *pair_table(rankings, found)]
    return lines

def compare(logs, args):
    """Logs -> report and pictures, and the lines to print: how the report begins, where it is."""
    dataset, size, _ = logs[0].same
    label = None if logs[0].text else logs[0].label
    choosing = [log for log in logs if log.kind != "smaller"]
    if not choosing:
        fail("these are static networks of other sizes only, which rank nothing")
    measures = [Ranking("static loss", log.seed, log.loss) for log in logs if log.kind == "full"]
    if args.human:
        measures.insert(0, Ranking("people", None, doubt_of_people(args.human, logs[0])))
    known = [log.arrays["difficulty"] for log in logs if "difficulty" in log.arrays]
    measures[:0] = [Ranking("known difficulty", None, each) for each in known[:1]]
    rankings, tables = rank(choosing)
    methods = list(by_method(rankings))
    answer = "fewer than two methods rank the examples"
    pictures = {"quality": draw_quality(logs), "time": draw_time(choosing)}
    if len(methods) > 1:
        found = study(rankings + measures, label)
        scripts = {log.name: log.meta.get("script", log.name) for log in choosing}
        answer = headline(methods, found, scripts)
        tables += ["## Do they agree?", "", *pair_table(rankings + measures, found),
                   *telling_tables(choosing)]
        pictures["agreement"] = draw_agreement(rankings + measures, found)
        if measures:
            pictures["deciles"] = draw_deciles(rankings, measures)
    ranked = [log for log in choosing if np.ptp(log.macs) > 0]
    images = test_images(logs[0], args.data)
    if ranked and images is not None:
        pictures["examples"] = draw_images(ranked, images)
    elif by_token := [log for log in ranked if "token_macs" in log.arrays]:
        pictures["examples"] = draw_passage(by_token)
    said = [f"**On {len(logs[0].macs):,} test examples of {dataset}, {answer}.**", "",
            "## Does it pay?", "", *paying_table(logs)]
    return [*said, write(Path(args.out, "figures", f"{dataset}-{size}"), said + tables, pictures)]

def write(folder, said, pictures):
    """Report and pictures {name: figure} -> a line on them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    shown = [f"![{name}]({name}.png)" for name in pictures]
    report = "\n".join([f"# {folder.name}", "", *said, *shown, "", *HOW_TO_READ, ""])
    (folder / "report.md").write_text(report, encoding="utf-8")
    return f"wrote {folder / 'report.md'}; pictures: {', '.join(pictures)}"


# === training what is missing ===
def train(args):
    """Run the scripts whose logs are missing -> how many failed. Adds their folder to args.logs."""
    flags = [f"--{key}={vars(args)[key]}" for key in (
        "dataset", "size", "data", "out", "device", "epochs") if vars(args)[key] is not None]
    cfg = importlib.import_module(STATIC).options(flags)
    runs = [(name, name, []) for name in METHODS]
    for key, value in dict(depth=max(1, cfg.depth // 2), width=round(cfg.width * 0.67)).items():
        runs.append((STATIC, f"{key}_{value}", [f"--{key}={value}"]))
    folder = Path(args.out, "logs", f"{cfg.dataset}-{cfg.size}")
    args.logs.append(folder)
    here = Path(__file__).resolve()
    commands = [[sys.executable, str(here.with_name(f"{script}.py")), *flags, *more,
                 f"--name={name}", f"--seed={seed}"]
                for seed in range(args.seeds) for script, name, more in runs
                if not (folder / f"{name}-s{seed}.npz").exists()]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    pool = ThreadPoolExecutor(args.jobs)
    failed = 0
    try:
        for command, done in zip(commands, pool.map(subprocess.run, commands)):
            if done.returncode:
                failed += 1
                print(f"failed with status {done.returncode}: {' '.join(command)}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed

def main(argv=None):
    parser = argparse.ArgumentParser(prog="compare_rankings.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="*", help="log files, or folders of them")
    add("--human", metavar="FILE", help="counts (N, 10) of how people labelled each image, .npy")
    add("--data", default="data", help="folder of the data sets, for the images of the report")
    add("--out", default=".", help="folder that receives figures/, and logs/ of --train")
    add("--train", action="store_true", help="first run the scripts whose logs are missing")
    add("--dataset", default="cifar10", choices=["cifar10", "shapes", *TEXTS], help="with --train")
    add("--size", choices=["tiny", "small", "base"], help="with --train (default: the scripts')")
    add("--device", choices=["cpu", "cuda"], help="with --train (default: the scripts')")
    add("--epochs", type=float, help="with --train: length of each run (default: by size)")
    add("--seeds", type=int, default=3, help="with --train: seeds 0 to N - 1 (default: 3)")
    add("--jobs", type=int, default=1, help="with --train: runs at once (default: 1)")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1 or not (args.logs or args.train):
        parser.error("name a folder of logs, or --train; --seeds and --jobs are at least 1")
    failed = train(args) if args.train else 0
    warnings.simplefilter("ignore", RuntimeWarning)         # what cannot be told becomes NaN
    print("\n".join(compare(gather(args.logs), args)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # printing a path of any name never fails
    try:
        sys.exit(main())
    except (OSError, KeyboardInterrupt) as error:
        fail(str(error) or "stopped")
