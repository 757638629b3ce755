"""Do different dynamic networks agree on which examples are hard?

The other scripts log the MACs that every test example took. This one ranks the examples by them,
one ranking per network, and asks two things:

    Does a mechanism pay?   Its quality at a budget, beside static networks of as many MACs, beside
                            its own decisions dealt out at random, and beside the full static one.
    Do they agree?          Spearman's rho, the correlation of ranks, of every pair of rankings.

    python compare_rankings.py logs/cifar10-small           # a folder, or any list of log files
    python compare_rankings.py --train --dataset shapes --size tiny --seeds 2      # from nothing
    python compare_rankings.py logs/cifar10-small --human cifar10h-counts.npy      # and people

Out come `figures/<dataset>-<size>/report.md`, answer first, and pictures. Rho is easily misread.
Equal MACs share a rank, and ties set a ceiling: two networks that order examples alike, of which
one lets half leave early and one 90 %, cannot exceed 0.33. Runs of one seed start alike and see the
same batches: unless there is but one seed, only runs of different seeds are compared. Differences
between the seeds of a method lower rho; "disattenuated" estimates what it would be without them.
"""
import argparse
import hashlib
import importlib
import itertools
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
STATIC = "relu_sparsity"        # trains static networks; a method of its own, without a budget
METHODS = (STATIC, "early_exit", "gumbel_gates", "moe", "token_boost")
TEXTS = ("shakespeare", "pydoc")
CLASSES = dict(cifar10="airplane automobile bird cat deer dog frog horse ship truck".split(),
               shapes=[f"{fill} {n} lobes" for n in (0, 2, 3, 4, 5) for fill in ("full", "hollow")])
BUDGETS = (0.35, 0.5, 0.6, 0.7, 0.85)       # of the sweeps, shares of the static network's MACs
WORDS = ((0.7, "strong"), (0.4, "moderate"), (0.2, "weak"), (-0.2, "no"), (-np.inf, "opposite"))
NEIGHBOURS = 16     # windows of a text that the bootstrap keeps together, as neighbours are alike


def fail(message):
    """End the program with one line and exit status 2."""
    print(f"compare_rankings.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# === logs ===
class Log:
    """A run, read and checked: N test examples, in a text of T characters each, and a sweep over S
    budgets. MACs are shares of the static network's."""

    def __init__(self, path):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            meta = json.loads(str(arrays.pop("meta")))
            text, static_macs = meta["dataset"] in TEXTS, meta["static_macs"]
            self.path, self.name, self.seed, self.meta = path, meta["name"], meta["seed"], meta
            self.text, self.group = text, f"{meta['dataset']}-{meta['size']}"
            self.same = self.group, meta["test_sha256"], len(arrays["macs"])    # in all of a report
            options = meta.setdefault("options", {})
            self.size = options.get("width"), options.get("depth")
            self.training = options.get("epochs"), options.get("steps")
            if type(self.seed) is not int:
                raise TypeError("its seed is no integer")
        except Exception as error:      # a file that is something else can fail in a dozen ways
            fail(f"{path}: is no log ({type(error).__name__}: {error})".replace("\n", " "))
        keys = ("label", "prediction", "loss", "macs", "sweep_macs", "sweep_loss", "sweep_correct")
        if missing := [key for key in keys if key not in arrays]:
            fail(f"{path}: misses {', '.join(missing)}")
        words = (self.name, meta["dataset"], meta["size"])
        if meta.get("schema") != 2 or not is_positive(static_macs) or any(
                not isinstance(word, str) or Path(word).name != word for word in words):
            fail(f"{path}: unknown schema, or meta data of the wrong kind")
        N, S = arrays["macs"].size, len(np.atleast_1d(arrays["sweep_macs"]))
        each = (N, arrays["label"].size // max(N, 1)) if text else (N,)
        shapes = dict(macs=(N,), label=each, prediction=each, loss=each, token_macs=each,
                      difficulty=(N,), sweep_macs=(S, N), sweep_loss=(S, N), sweep_correct=(S, N))
        for key in shapes.keys() & arrays.keys():
            if arrays[key].shape != shapes[key] or N < 10 or S < 1:
                fail(f"{path}: {key} has shape {arrays[key].shape}, {shapes[key]} is expected, "
                     "of at least 10 examples")
            if arrays[key].dtype.kind not in "biuf" or not (
                    np.isfinite(arrays[key]).all() and arrays[key].min() >= 0):
                fail(f"{path}: {key} holds NaN, infinity, something below 0, or no numbers")
        self.label, self.difficulty = arrays["label"], arrays.get("difficulty")
        self.loss = arrays["loss"].astype(float)
        self.macs = arrays["macs"] / static_macs                                # (N,) as logged
        self.sweep_macs = arrays["sweep_macs"] / static_macs                    # (S, N)
        self.sweep_quality = arrays["sweep_loss" if text else "sweep_correct"].astype(float)
        self.spent, self.quality = self.sweep_macs.mean(1), self.sweep_quality.mean(1)      # (S,)
        self.token_macs = None                                                  # (N, T)
        if text and "token_macs" in arrays:
            self.token_macs = arrays["token_macs"] * (each[1] / static_macs)
        dealt, better = meta.get("random"), "loss" if text else "accuracy"
        try:                            # what may be missing costs its cell, or its picture
            self.random = np.array([float(dealt[k][better]) for k in range(S)])
        except (TypeError, KeyError, ValueError, IndexError):
            self.random = np.full(S, np.nan)
        clock = meta.get("wall_clock")
        try:
            self.time = [clock[f"skipping_ms_batch_{batch}"] / clock[f"static_ms_batch_{batch}"]
                         for batch in (1, 256)]
        except (TypeError, KeyError, ZeroDivisionError):
            self.time = [np.nan, np.nan]
        self.seconds = meta["seconds"] if is_positive(meta.get("seconds")) else np.nan
        self.kind = "full" if self.name == STATIC else "method"
        static = meta.get("script") == STATIC and not options.get("sparsity_weight")
        if static and self.kind != "full":
            self.kind = "smaller"       # a static network of another size: no ranking

    def point(self, budget):
        """The point of the sweep that spends a budget, to 0.03, or None."""
        nearest = abs(self.spent - budget).argmin()
        return nearest if abs(self.spent[nearest] - budget) < 0.03 else None


def is_positive(value):
    return type(value) in (int, float) and 0 < value < 1e30


def gather(paths):
    """Files and folders -> their logs, which are about the same examples, by method and seed."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            fail(f"{path}: no such file or folder")
        files += sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        fail(f"{', '.join(map(str, paths))}: no logs (.npz)")
    logs, seen = [Log(path) for path in dict.fromkeys(files)], {}
    trained = next((log for log in logs if log.training != (None, None)), None)
    for log in logs:
        if log.training not in ((None, None), trained and trained.training):
            fail(f"{log.path}: epochs and steps {log.training} are not those of {trained.path}")
        if log.same != logs[0].same or not np.array_equal(log.label, logs[0].label):
            fail(f"{log.path}: data set, size, test split or its order are not those of "
                 f"{logs[0].path} ({log.same}, {logs[0].same})")
        if (log.name, log.seed) in seen:
            fail(f"{log.path}: the same method and seed as {seen[log.name, log.seed]}")
        seen[log.name, log.seed] = log.path
    order = [*METHODS, *sorted({log.name for log in logs} - set(METHODS))]
    return sorted(logs, key=lambda log: (order.index(log.name), log.seed))


def by_method(logs):
    """{name: its logs}, of logs in the order of `gather`."""
    return {name: list(runs) for name, runs in itertools.groupby(logs, lambda log: log.name)}


# === statistics ===
def midranks(x):
    """x (N,) -> ranks from 1 to N, equal values sharing the mean of theirs."""
    _, code, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[code]     # the last rank of a value, less half


def correlate(columns):
    """columns (N, L) -> Spearman's rho (L, L): Pearson's of midranks; NaN where one is constant."""
    return np.corrcoef(np.stack([midranks(x) for x in columns.T], 1), rowvar=False)


def spearman(x, y):
    """x, y (N,) -> rho."""
    return correlate(np.stack([x, y], 1))[0, 1]


def tie_ceiling(columns):
    """The highest rho (L, L) that ties allow: that of sorted columns."""
    return correlate(np.sort(columns, axis=0))


def within_class(columns, label, least=30):
    """Mean (L, L) of rho over the classes of at least so many examples, where it is defined."""
    names, counts = np.unique(label, return_counts=True)
    each = np.array([correlate(columns[label == name]) for name in names[counts >= least]])
    return np.nanmean(each, 0) if len(each) else np.full(2 * columns.shape[1:], np.nan)


def membership(x, k):
    """x (N,) -> how much each belongs to the k largest; ties for the last places share them."""
    last = np.sort(x)[-k]
    above, equal = x > last, x == last
    return above + equal * (k - above.sum()) / equal.sum()


def top_overlap(columns, k):
    """Share (L, L) that the k costliest examples of two columns have in common; chance: k / N."""
    member = np.stack([membership(x, k) for x in columns.T], 1)
    return member.T @ member / k


def entropy(counts):
    """counts (N, K) of how people labelled each example -> nats (N,)."""
    p = counts / counts.sum(1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


def split_half(counts, repeats=10):
    """Reliability of the entropy of counts (N, K): rho between two halves of the people, stepped up
    to all of them (Spearman-Brown, 2 r / (1 + r))."""
    rng, rho = np.random.default_rng(0), []
    for _ in range(repeats):
        half = np.stack([rng.multivariate_hypergeometric(row, row.sum() // 2) for row in counts])
        rho.append(spearman(entropy(half), entropy(counts - half)))
    return 2 * np.mean(rho) / (1 + np.mean(rho))


class Rankings(NamedTuple):
    """MACs, or another measure of hardness, of N examples in L columns: runs of A rankings."""
    names: list             # (A,) the methods first
    methods: int            # how many are methods
    member: np.ndarray      # (L,) which ranking a column belongs to
    seed: np.ndarray        # (L,)
    known: dict             # {ranking: reliability} of those that have no seeds
    columns: np.ndarray     # (N, L)


def rankings(logs, compute, references=()):
    """compute: log -> (N,). references: (name, list of (N,), their seeds, known reliability or
    None)."""
    runs = by_method(logs)
    rows = [(name, [compute(log) for log in own], [log.seed for log in own])
            for name, own in runs.items()]
    names, columns, seeds = zip(*rows, *(reference[:3] for reference in references))
    known = {len(runs) + i: row[3] for i, row in enumerate(references) if row[3] is not None}
    seed = np.concatenate(seeds)
    if len({log.seed for log in logs}) == 1:
        seed = np.arange(len(seed))     # nothing but one seed: compared all the same
    member = np.repeat(range(len(names)), [len(own) for own in columns])
    return Rankings(names, len(runs), member, seed, known,
                    np.stack([*itertools.chain(*columns)], 1).astype(float))


def agreement(rho, table):
    """rho (..., L, L) of runs -> of rankings (..., A, A), the mean over pairs of runs of different
    seeds, reliability on the diagonal; and the same, disattenuated: over the root of the product of
    both reliabilities. NaN: no two seeds, a reliability below 0.1, or constant MACs."""
    A = len(table.names)
    raw = np.full((*rho.shape[:-2], A, A), np.nan)
    for a, b in np.ndindex(A, A):
        apart = (table.member == a)[:, None] & (table.member == b)
        apart &= table.seed[:, None] != table.seed
        if apart.any():
            raw[..., a, b] = rho[..., apart].mean(-1)
    for a, reliability in table.known.items():
        raw[..., a, a] = reliability
    own = np.diagonal(raw, axis1=-2, axis2=-1)
    scale = np.sqrt(np.where(own > 0.1, own, np.nan))       # dividing by noise would be noise
    return raw, raw / (scale[..., :, None] * scale[..., None, :])


def bootstrap(columns, resamples=300, block=1):
    """rho (resamples, L, L) of rows drawn with replacement, in blocks of neighbours."""
    rng, block = np.random.default_rng(0), min(block, len(columns) // 10)
    blocks, rho = len(columns) // block, []
    codes = np.stack([np.unique(x, return_inverse=True)[1] for x in columns.T], 1)
    for _ in tqdm(range(resamples), "bootstrap", leave=False):
        first = block * rng.integers(blocks, size=blocks)
        rho.append(correlate(codes[(first[:, None] + np.arange(block)).ravel()]))
    return np.stack(rho)


def study(table, label=None, telling=None, block=1, resamples=300):
    """{kind: (raw, disattenuated)} of Rankings. label (N,): classes. telling (N,) bool: what is
    neither trivial nor impossible; only there can networks differ (Meding et al. 2022)."""
    columns = table.columns
    rho = {"all": correlate(columns), "interval": bootstrap(columns, resamples, block),
           "ceiling": tie_ceiling(columns), "top": top_overlap(columns, len(columns) // 10)}
    if label is not None:
        rho["within classes"] = within_class(columns, label)
    if telling is not None and telling.sum() >= 30:
        rho["neither trivial nor impossible"] = correlate(columns[telling])
    return {kind: agreement(matrix, table) for kind, matrix in rho.items()}


# === does it pay? ===
def frontier(logs, macs):
    """What static networks of so many MACs reach, the mean of their seeds, by linear interpolation
    between narrower ones and between shallower ones; the better of the two. NaN beyond the smallest
    and the full one, to 0.03 of the full one's."""
    full, found = [log for log in logs if log.kind == "full"], []
    for fixed in (0, 1) if full else ():        # of the same width, of the same depth
        alike = [log for log in logs if log.kind == "full" or log.kind == "smaller"
                 and log.size[fixed] == full[0].size[fixed]
                 and log.meta["static_macs"] < full[0].meta["static_macs"]]
        points = sorted((runs[0].meta["static_macs"], np.mean([log.quality[-1] for log in runs]))
                        for runs in by_method(alike).values())
        slack = 0.03 * points[-1][0]
        if len(points) > 1 and points[0][0] - slack < macs < points[-1][0] + slack:
            found.append(np.interp(macs, *zip(*points)))
    return (min if logs[0].text else max)(found, default=np.nan)


def verdict(quality, static, dealt, full, text):
    """Whether it pays, in words: qualities (seeds,) at a budget, of the static frontier there, of
    decisions dealt at random, and of the full static network."""
    sign, near, failed = -1 if text else 1, 0.01 if text else 0.003, []
    if (sign * (quality - static) <= 0).any():                  # never so with NaN
        failed.append("not better than static networks")
    if (sign * (quality - dealt) <= 0).any():
        failed.append("not better than random decisions")
    if sign * (quality.mean() - full) < -near:
        failed.append("worse than the full network")
    if not failed and np.isnan([*static, *dealt, full]).any():
        return "unknown: something to compare with is missing"
    return f"no: {', '.join(failed)}" if failed else "yes"


def paying_table(logs):
    """A row for each method and budget."""
    rows, full = [], np.mean([log.quality[-1] for log in logs if log.kind == "full"] or [np.nan])
    methods = by_method(log for log in logs if log.kind == "method")
    for (name, runs), budget in itertools.product(methods.items(), BUDGETS):
        points = [(log, log.point(budget)) for log in runs if log.point(budget) is not None]
        if len(points) < len(runs):
            continue                            # out of reach for a seed
        spent = np.array([log.spent[k] for log, k in points])
        quality = np.array([log.quality[k] for log, k in points])
        dealt = np.array([log.random[k] for log, k in points])
        static = np.array([frontier(logs, log.spent[k] * log.meta["static_macs"])
                           for log, k in points])
        rows.append([name, str(len(runs)), spread(spent, 3), spread(quality, 4), spread(static, 4),
                     spread(dealt, 4), number(full, 4),
                     verdict(quality, static, dealt, full, logs[0].text)])
    better = "test loss, nats" if logs[0].text else "test accuracy"
    return markdown(["method", "seeds", "MACs, share of static", better,
                     "static networks of as many MACs (interpolated)", "its decisions at random",
                     "full static network", "does it pay?"], rows)


def static_table(logs):
    """Static networks of all widths and depths, trained alike: what MACs buy."""
    networks = by_method(log for log in logs if log.kind != "method")
    macs = {name: runs[0].meta["static_macs"] for name, runs in networks.items()}
    rows = [[name, *map(str, networks[name][0].size), f"{macs[name] / 1e6:.2f} M",
             number(macs[name] / macs.get(STATIC, np.nan)),
             spread([log.seconds / 60 for log in networks[name]], 1),
             ", ".join(str(log.seed) for log in networks[name]),
             spread([log.quality[-1] for log in networks[name]], 4)]
            for name in sorted(macs, key=macs.get, reverse=True)]
    return markdown(["static network", "width", "depth", "MACs", "share", "minutes of training",
                     "seeds", f"test {'loss' if logs[0].text else 'accuracy'}"], rows)


# === the report ===
def number(x, digits=2):
    return "unknown" if np.isnan(x) else f"{round(float(x), digits) + 0.0:.{digits}f}"   # no -0.00


def spread(values, digits=2):
    """Mean (lowest to highest)."""
    values = np.asarray(values, float)
    if len(values) == 1 or np.isnan(values).any():
        return number(values.mean(), digits)
    low, high = (number(x, digits) for x in (values.min(), values.max()))
    return f"{number(values.mean(), digits)} ({low} to {high})"


def markdown(header, rows):
    """Strings -> the lines of a Markdown table, and an empty one; nothing without rows."""
    return [] if not rows else ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def word(rho):
    """How people call an agreement of rho, as it is printed."""
    if np.isnan(rho):
        return "unknown"
    return next(word for least, word in WORDS if round(float(rho), 2) >= least)


def pair_table(table, found):
    """A row for each pair of methods."""
    (raw, full), rows = found["all"], []
    low, high = np.percentile(found["interval"][1], [2.5, 97.5], axis=0)
    extra = [kind for kind in ("within classes", "neither trivial nor impossible") if kind in found]
    for pair in itertools.combinations(range(table.methods), 2):
        rows.append([" and ".join(table.names[i] for i in pair), word(full[pair]),
                     f"{number(full[pair])} [{number(low[pair])} to {number(high[pair])}]",
                     *(number(found[kind][1][pair]) for kind in extra), number(raw[pair]),
                     number(found["ceiling"][0][pair]), number(found["top"][0][pair])])
    return markdown(["pair", "agreement", "disattenuated rho [95 % over examples]", *extra,
                     "raw rho", "ceiling by ties", "costliest 10 % shared"], rows)


def reference_table(table, found):
    """A row for each method: how reliable its ranking is, and its rho with what else is known."""
    rows, raw, others = [], found["all"][0], range(table.methods, len(table.names))
    for m in range(table.methods):
        values = len(np.unique(table.columns[:, list(table.member).index(m)]))
        rows.append([table.names[m], f"{values:,}", *(number(raw[m, r]) for r in (m, *others))])
    return markdown(["ranking by the MACs of", "distinct values", "rho between its own seeds",
                     *(f"rho with {table.names[r]}" for r in others)], rows)


def answer(logs, table, found, at_budgets):
    """The lines that come first. at_budgets: {budget: median raw and disattenuated rho}."""
    pairs = np.triu_indices(table.methods, 1)
    disattenuated = np.isfinite(found["all"][1][pairs]).any()
    kind = "disattenuated" if disattenuated else "raw"              # where nothing else is known
    rho = found["all"][int(disattenuated)][pairs]
    middle, low, high = np.nanmedian(rho), np.nanmin(rho), np.nanmax(rho)
    names = ", ".join(table.names[:table.methods])
    unit = "windows of" if logs[0].text else "test images of"
    lines = [f"**On {len(logs[0].macs):,} {unit} {logs[0].meta['dataset']}, {names} show "
             f"{word(middle)} agreement on which take the most compute: median {kind} rho of their "
             f"rankings {number(middle)} ({np.isfinite(rho).sum()} of {len(rho)} pairs: "
             f"{number(low)} to {number(high)}).**", ""]
    if not disattenuated:
        lines += ["Reliability is unknown, or below 0.1: it takes two seeds that agree. Raw rho is "
                  "lower than the agreement behind it.", ""]
    if at_budgets:
        told = [f"{number(both[int(disattenuated)])} at {b}" for b, both in at_budgets.items()]
        lines += ["The median of the methods that choose their compute, at equal budgets: "
                  f"{', '.join(told)} of the MACs.", ""]
    return lines


HOW_TO_READ = f"""
## How to read this

Agreement by rho: {', '.join(f'{name} from {least}' for least, name in WORDS[:-1])}, opposite below.
For scale, how alike *errors* are on CIFAR-10 (published predictions, CIFAR-10H; disattenuated): two
families of CNN 0.80 to 0.88, a CNN and random features 0.55, people and machines 0.43.

* *Disattenuated*: raw rho over the root of the product of both reliabilities, the rho between seeds
  of one method. 1: methods differ no more than their own seeds; noise can carry it beyond. The
  interval is over examples; other seeds may differ by more.
* *Ceiling by ties*: the highest raw rho possible, as many examples share the same MACs.
  *Costliest 10 % shared*: by chance 0.10.
* *Neither trivial nor impossible*: without images that all full static networks get right, or all
  get wrong.
* *It pays*, in MACs, if each seed is better than the mean of static networks of as many MACs
  (narrower and shallower ones, interpolated) and than its own decisions dealt out at random, and
  the mean is within 0.3 points, or 0.01 nats, of the full static network. Time is another matter.
* *Unknown*: too few seeds, a reliability below 0.1, the same MACs for all, or no such log.
""".strip().splitlines()


# === pictures ===
def canvas(title, width, height):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def lines_of(axis, logs, curves, style="o-"):
    """A line for each run, curves [(x, y)]; runs of a method share its colour and its label."""
    names = list(by_method(logs))
    for i, (log, curve) in enumerate(zip(logs, curves)):
        first = i == 0 or logs[i - 1].name != log.name
        axis.plot(*curve, style, ms=3, color=f"C{names.index(log.name) % 10}",
                  label=log.name if first and style == "o-" else None)


def draw_agreement(table, found):
    A, (raw, full) = len(table.names), found["all"]
    figure = canvas("rho of the rankings: disattenuated above the diagonal,\nraw below, between "
                    "seeds of one ranking on it", 4 + A, 3 + 0.8 * A)
    axis, shown = figure.subplots(), np.where(np.tri(A, dtype=bool), raw, full)
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.75)
    for (i, j), rho in np.ndenumerate(shown):
        axis.text(j, i, number(rho), ha="center", va="center")
    axis.set_xticks(range(A), table.names, rotation=30, ha="right")
    axis.set_yticks(range(A), table.names)
    figure.colorbar(image, label="Spearman's rho")
    return figure


def draw_quality(logs):
    figure = canvas("what compute buys; dashed: the same decisions, dealt at random", 9, 6)
    axis, methods = figure.subplots(), [log for log in logs if log.kind == "method"]
    lines_of(axis, methods, [(log.spent, log.quality) for log in methods])
    lines_of(axis, methods, [(log.spent, log.random) for log in methods], "--")
    shares, full = np.linspace(0.2, 1, 100), [log for log in logs if log.kind == "full"]
    static = [frontier(logs, share * full[0].meta["static_macs"]) for share in shares if full]
    axis.plot(shares[:len(static)], static, "k", lw=2, label="static networks")
    axis.set(xlabel="mean MACs, share of the static network's",
             ylabel="test loss, nats per character" if logs[0].text else "test accuracy")
    axis.legend()
    return figure


def draw_deciles(logs, panels):
    """panels: [(name, hardness (M,), MACs of each log (M,))]."""
    figure = canvas("what easy and hard examples cost", 5 * len(panels), 5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, hardness, costs) in zip(axes, panels):
        deciles = np.array_split(hardness.argsort(kind="stable"), 10)
        curves = [(range(1, 11), [cost[decile].mean() for decile in deciles]) for cost in costs]
        lines_of(axis, logs, curves)
        axis.set(title=f"by {name}", xlabel="decile, easy to hard", ylabel="MACs, share of static")
        axis.legend(fontsize=8)
    return figure


def draw_images(logs, images, labels, count=6):
    """Of one class: a row for each method, the cheapest on the left, the dearest on the right."""
    methods, kind = by_method(logs), sorted(set(labels))[len(set(labels)) // 2]
    members = np.flatnonzero(np.array(labels) == kind)
    figure = canvas(f"{kind}: the cheapest and the dearest for each method, with their share of "
                    "the MACs", 2.6 * count, 1.5 * len(methods))
    for row, (name, runs) in zip(figure.subplots(len(methods), 2 * count), methods.items()):
        macs = np.mean([log.macs for log in runs], 0)[members]
        order = macs.argsort(kind="stable")
        for axis, i in zip(row, [*order[:count], *order[-count:]]):
            axis.imshow(images[members[i]].transpose(1, 2, 0))
            axis.set_title(f"{macs[i]:.3f}", fontsize=8)
            axis.axis("off")
        row[0].text(-4, 16, name, rotation=90, ha="right", va="center")
    return figure


def draw_passage(logs, read):
    """The window of a text read (N, T) that methods see most unevenly; darker: more MACs."""
    methods, T = by_method(logs), min(64, read.shape[1])
    ranks = np.stack([midranks(np.mean([log.token_macs for log in runs], 0).ravel())
                      for runs in methods.values()]).reshape(-1, *read.shape)
    i = ranks.std((0, 2)).argmax()
    figure = canvas(f"window {i}: the characters on which each method spends", 14, 4)
    axis = figure.subplots()
    axis.imshow(ranks[:, i, :T], cmap="Blues", aspect="auto", alpha=0.7)
    for m, t in np.ndindex(len(methods), T):
        sign = chr(read[i, t]).replace("\n", "↵").replace("$", r"\$")
        axis.text(t, m, sign, ha="center", va="center", family="monospace", fontsize=8)
    axis.set_yticks(range(len(methods)), methods)
    return figure


def draw_time(logs):
    methods, bars = by_method(logs), {"MACs": [], "time, batch of 1": [], "time, batch of 256": []}
    for runs in methods.values():
        shares = np.mean([[log.macs.mean(), *log.time] for log in runs], 0)
        for bar, share in zip(bars.values(), shares):
            bar.append(share)
    figure = canvas("MACs and time, shares of the static network's", 11, 5)
    axis = figure.subplots()
    for k, (label, shares) in enumerate(bars.items()):
        drawn = axis.bar(np.arange(len(methods)) + 0.27 * (k - 1), shares, 0.25, label=label)
        axis.bar_label(drawn, [number(share) for share in shares])
    axis.axhline(1, color="black", lw=1)
    axis.set_xticks(range(len(methods)), methods)
    axis.legend()
    return figure


# === comparing ===
def test_images(log, folder):
    """The test images of a log, uint8 (N, 3, 32, 32), or None where they are not at hand: nothing
    is downloaded, the static network's script reads or draws them."""
    dataset = log.meta["dataset"]
    if dataset == "cifar10" and not Path(folder, "cifar-10-batches-bin").exists():
        return None
    script = importlib.import_module(STATIC)
    data = script.load_data(script.options([f"--dataset={dataset}", f"--data={folder}",
                                            "--size=tiny", "--device=cpu"]))
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in data["test"]))
    return data["test"][0].numpy() if digest.hexdigest() == log.meta["test_sha256"] else None


def read_people(path, log):
    """Counts (N, 10) of how people labelled each test image."""
    try:
        counts = np.load(path, allow_pickle=False).astype(float)
    except Exception as error:          # no file, or one that is something else
        fail(f"{path}: is no array of counts, .npy ({error})")
    if log.meta["dataset"] != "cifar10" or counts.shape != (len(log.macs), 10):
        fail(f"{path}: --human takes counts {(len(log.macs), 10)} for cifar10, not {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum(1).min() < 2:
        fail(f"{path}: holds NaN, negative counts, or images that fewer than two people labelled")
    if (counts.argmax(1) == log.label).mean() < 0.5:
        fail(f"{path}: people agree with fewer than half of the labels: not in the official order?")
    return counts.astype(np.int64)


def agree(logs, args):
    """Whether rankings agree -> the answer, tables, and pictures {name: figure}."""
    first, text, full = logs[0], logs[0].text, [log for log in logs if log.kind == "full"]
    references, label, telling = [], None if text else first.label, None
    if first.difficulty is not None:
        references.append(("known difficulty", [first.difficulty], [-1], 1.0))
    if args.human:
        counts = read_people(args.human, first)
        references.append(("people", [entropy(counts)], [-2], split_half(counts)))
    if full:
        losses = [log.loss.reshape(len(log.loss), -1).mean(1) for log in full]
        references.append(("static loss", losses, [log.seed for log in full], None))
    if len(full) > 1 and not text:
        right = np.array([log.sweep_quality[-1] for log in full])
        telling = right.min(0) != right.max(0)
    table = rankings(logs, lambda log: log.macs, references)
    found = study(table, label, telling, NEIGHBOURS if text else 1)
    at_budgets, choosing = {}, [log for log in logs if log.kind == "method"]
    for budget in BUDGETS if len(by_method(choosing)) > 1 else ():
        if all(log.point(budget) is not None for log in choosing):
            same = rankings(choosing, lambda log: log.sweep_macs[log.point(budget)])
            pairs = np.triu_indices(same.methods, 1)
            both = agreement(correlate(same.columns), same)
            at_budgets[budget] = [np.nanmedian(rho[pairs]) for rho in both]
    tables = ["## Do they agree?", "", *pair_table(table, found), *reference_table(table, found)]
    if telling is not None:
        tables += [f"{telling.sum():,} images are neither trivial nor impossible.", ""]
    panels = [(name, np.mean(columns, 0), [log.macs for log in logs])
              for name, columns, *_ in references]
    pictures = {"agreement": draw_agreement(table, found), "time": draw_time(logs)}
    if text and all(log.token_macs is not None for log in logs):
        costs = [log.token_macs.ravel() for log in logs]
        tokens = rankings(logs, lambda log: log.token_macs.ravel())
        by_token = study(tokens, block=NEIGHBOURS * first.label.shape[1], resamples=50)
        tables += ["The same by character:", "", *pair_table(tokens, by_token)]
        if full:
            loss = np.mean([log.loss.ravel() for log in full], 0)
            panels.append(("static loss of a character", loss, costs))
        read = np.append(32, first.label)[:-1].reshape(first.label.shape)       # windows join up
        pictures["examples"] = draw_passage(logs, read)
    if panels:
        pictures["deciles"] = draw_deciles(logs, panels)
    if not text and (images := test_images(first, args.data)) is not None:
        labels = [CLASSES[first.meta["dataset"]][y] for y in first.label]
        pictures["examples"] = draw_images(logs, images, labels)
    elif not text:
        tables += [f"No pictures of images: their data set is not in {args.data} (--data).", ""]
    return answer(logs, table, found, at_budgets), tables, pictures


def compare(logs, args):
    """Write the report and its pictures -> the lines to print."""
    ranked = [log for log in logs if log.kind != "smaller"]
    first, tables, pictures = [], [], {}
    if len(by_method(ranked)) > 1:
        first, tables, pictures = agree(ranked, args)
    pictures["quality"] = draw_quality(logs)
    said = [*first, "## Does it pay?", "", *paying_table(logs), *static_table(logs), *tables]
    folder = Path(args.out, "figures", logs[0].group)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    shown = [f"![{name}]({name}.png)" for name in pictures]
    report = "\n".join([f"# {logs[0].group}", "", *said, *shown, "", *HOW_TO_READ, ""])
    (folder / "report.md").write_text(report, encoding="utf-8")
    return [*said, f"wrote {folder / 'report.md'} and {len(pictures)} pictures"]


# === training what is missing ===
def train(args):
    """Run the scripts whose logs are missing -> the folder of logs, and how many runs failed."""
    flags = [f"--{key}={vars(args)[key]}" for key in (
        "dataset", "size", "data", "out", "device", "steps") if vars(args)[key] is not None]
    cfg = importlib.import_module(STATIC).options(flags)
    half, narrow = max(1, cfg.depth // 2), round(cfg.width * 0.7)
    runs = [(name, name, []) for name in METHODS]
    runs += [(STATIC, f"depth_{half}", [f"--depth={half}"]),
             (STATIC, f"width_{narrow}", [f"--width={narrow}"])]
    folder = Path(args.out, "logs", f"{cfg.dataset}-{cfg.size}")
    commands = [[sys.executable, str(HERE / f"{script}.py"), *flags, *more, f"--name={name}",
                 f"--seed={seed}"] for seed, (script, name, more) in
                itertools.product(range(args.seeds), runs)
                if not (folder / f"{name}-s{seed}.npz").exists()]
    failed, pool = 0, ThreadPoolExecutor(args.jobs)
    try:
        for command, done in zip(commands, pool.map(subprocess.run, commands)):
            if done.returncode:
                failed += 1
                print(f"failed with status {done.returncode}: {' '.join(command)}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)
    return folder, failed


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="compare_rankings.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("logs", nargs="*", help="log files, or folders of them")
    add("--human", metavar="FILE", help="counts (N, 10) of how people labelled each image, .npy")
    add("--data", default="data", help="folder of the data sets, for the images of the report")
    add("--out", default=".", help="folder that receives figures/, and logs/ of --train")
    add("--train", action="store_true", help="first run the scripts whose logs are missing")
    add("--dataset", default="cifar10", choices=["cifar10", "shakespeare", "shapes", "pydoc"],
        help="with --train (default: cifar10)")
    add("--size", choices=["tiny", "small", "base"], help="with --train (default: the scripts')")
    add("--device", choices=["cpu", "cuda"], help="with --train (default: the scripts')")
    add("--steps", type=int, help="with --train: training steps of each run (default: by size)")
    add("--seeds", type=int, default=3, help="with --train: seeds 0 to N - 1 (default: 3)")
    add("--jobs", type=int, default=1, help="with --train: runs at once (default: 1)")
    args = parser.parse_args(argv)
    if not args.logs and not args.train:
        parser.error("name a folder of logs, or --train; --help explains")
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    sys.stdout.reconfigure(errors="replace")            # printing a path of any name never fails
    failed = 0
    if args.train:
        folder, failed = train(args)
        args.logs.append(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # what cannot be told becomes NaN
        print("\n".join(compare(gather(args.logs), args)))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, KeyboardInterrupt) as error:
        fail(str(error) or "stopped")
