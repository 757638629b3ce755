"""Do different dynamic networks agree on which examples are hard?

Each of the other scripts logs what every test example cost. This one ranks the examples by that
cost, one ranking per network, and asks how alike the rankings are: from "all networks think long
about the same examples" to "each has its own opinion of what is hard".

    python compare_rankings.py                              # which logs are there, what to run
    python compare_rankings.py logs/cifar10-small           # a folder, or any list of log files
    python compare_rankings.py --train --dataset shapes --size small --seeds 2     # from nothing
    python compare_rankings.py logs/cifar10-small --human cifar10h-counts.npy      # and people

`--train` runs the five scripts for the logs that are missing (`--jobs K`: K at once), and goes on
after a failure; run again, it trains what is still missing. A finished log that was trained with
other options is refused, never overwritten and never compared by mistake. Out come
`figures/<dataset>-<size>/report.md`, answer first, and its pictures. A log of your own takes part
if it follows the schema of the README.

The measure is Spearman's rho: the correlation of ranks, where equal costs share the mean of their
ranks. It is easily misread: two methods with the very same idea of hardness and different shares of
early exits may be unable to exceed 0.33. The end of every report defines what stands beside it.
Runs of the same seed are compared only where there is one seed: they start from the same weights
and see the same batches, which alone makes them alike. Intervals are bootstraps over
examples (of a text over stretches of it, since neighbours cost alike). Seeds are too few for that:
of them the report gives the lowest and the highest.
"""
import argparse
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

STATIC = "relu_sparsity"        # trains the static network; has no budget
METHODS = (STATIC, "early_exit", "gumbel_gates", "moe", "token_boost")
TEXTS = ("shakespeare", "pydoc")
CLASSES = dict(cifar10="airplane automobile bird cat deer dog frog horse ship truck".split(),
               shapes=[f"{fill} {n} lobes" for n in (0, 2, 3, 4, 5) for fill in ("full", "hollow")])
BUDGETS = (0.6, 0.7, 0.85)      # mean MACs, as shares of the dense ones, at which all are compared
VIEWS = ("as logged", *(f"at {budget:.2f}" for budget in BUDGETS), "sweep average")
WORDS = ((0.7, "largely agree"), (0.4, "partly agree"), (0.15, "hardly agree"),
         (-0.15, "do not agree"), (-0.4, "weakly contradict each other"),
         (-np.inf, "contradict each other"))        # rho from here upwards
BLOCK = 16      # windows of text that the bootstrap keeps together: neighbours cost alike
HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """What the person at the keyboard can mend: shown as one line, exit status 2."""


# Shapes below: N examples, L logs (columns), A rankings (methods and references, of several logs
# each), T tokens, S thresholds of a sweep. A matrix (L, L) or (A, A) may have axes before it.


# --- Logs -----------------------------------------------------------------------------------------

class Log(NamedTuple):
    """One run of one method, reduced to what is compared."""
    path: Path
    meta: dict
    views: np.ndarray       # (len(VIEWS), N) MACs for each; NaN where the sweep does not reach
    curve: np.ndarray       # (2, S) share of the dense MACs, accuracy (text: loss)
    quality: float          # accuracy (text: loss) as logged
    label: object = None        # (N,) or (N, T)
    right: object = None        # (N,) or (N, T) bool
    loss: object = None         # (N,) or (N, T)
    tokens: object = None       # (N, T) MACs of single tokens
    difficulty: object = None   # (N,) where it is known

    @property
    def macs(self):
        """(N,) as logged: at the calibrated threshold."""
        return self.views[0]

    @property
    def text(self):
        return self.meta["dataset"] in TEXTS

    @property
    def group(self):
        """<dataset>-<size>, the name of the folder."""
        return f"{self.meta['dataset']}-{self.meta['size']}"

    @property
    def cost(self):
        """(N,) MACs as logged, as shares of the dense ones."""
        return self.macs / self.meta["static_macs"]


def at_budget(sweep_macs, wanted):
    """sweep_macs (S, N) -> (N,): what each example costs when the mean is `wanted`, on the straight
    line between the two thresholds around it. NaN if the sweep does not reach that far."""
    sweep_macs = sweep_macs[np.argsort(sweep_macs.mean(1), kind="stable")]
    mean = sweep_macs.mean(1)
    if not mean[0] <= wanted <= mean[-1]:
        return np.full(sweep_macs.shape[1], np.nan)
    i = np.clip(np.searchsorted(mean, wanted), 1, len(mean) - 1)
    share = (wanted - mean[i - 1]) / max(mean[i] - mean[i - 1], 1e-9)
    return (1 - share) * sweep_macs[i - 1] + share * sweep_macs[i]


def is_positive(value):
    return isinstance(value, (int, float)) and 0 < value < np.inf


def load(path):
    """Read and check one log. Raises UserError."""
    def refuse(why):
        raise UserError(f"{path}: {why}")

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays.pop("meta")))
    except KeyError:
        refuse("the key 'meta' is missing")
    except Exception as e:      # a file that is something else can fail in a dozen ways
        refuse(f"is no log ({e or type(e).__name__})".replace("\n", " "))
    if not isinstance(meta, dict) or meta.get("schema") != 2:
        refuse("unknown schema (2 is expected)")
    missing = [key for key in ("name", "dataset", "size", "seed", "test_sha256", "static_macs")
               if key not in meta]
    missing += [key for key in ("label", "prediction", "loss", "macs", "sweep_threshold",
                                "sweep_macs", "sweep_loss", "sweep_correct") if key not in arrays]
    if missing:
        refuse(f"misses {', '.join(missing)}")
    words = [meta[key] for key in ("name", "dataset", "size")]
    if not (all(isinstance(w, str) and Path(w).name == w for w in words)
            and isinstance(meta["seed"], int) and is_positive(meta["static_macs"])
            and isinstance(meta.get("options", {}), dict)):
        refuse("its meta data are of the wrong kind")
    clock, keys = meta.get("wall_clock"), [f"{run}_ms_batch_{batch}" for run in
                                           ("static", "skipping") for batch in (1, 256)]
    if not isinstance(clock, dict) or not all(is_positive(clock.get(key)) for key in keys):
        meta["wall_clock"] = None                           # what is not there costs its picture
    if not is_positive(meta.get("seconds")):
        meta["seconds"] = None

    text, N, S = meta["dataset"] in TEXTS, arrays["macs"].shape[:1], arrays["sweep_threshold"].shape
    each = arrays["loss"].shape if text and arrays["loss"].ndim == 2 else N
    shapes = dict(label=each, prediction=each, loss=each, macs=N, sweep_macs=S + N,
                  sweep_loss=S + N, sweep_correct=S + N, difficulty=N)
    if text:
        shapes["token_macs"] = each
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number):
            refuse(f"{key} is not numeric")
        if not np.isfinite(array).all():
            refuse(f"{key} holds NaN or infinity")
        if array.shape != shapes.get(key, array.shape):
            refuse(f"{key} has shape {array.shape}, {shapes[key]} is expected")
    if not N or N[0] < 10 or not S or not S[0]:
        refuse("holds fewer than 10 examples, or no sweep")

    right, sweep = arrays["prediction"] == arrays["label"], arrays["sweep_macs"].astype(float)
    views = [arrays["macs"], sweep.mean(0)]
    views[1:1] = [at_budget(sweep, budget * meta["static_macs"]) for budget in BUDGETS]
    quality = arrays["sweep_loss" if text else "sweep_correct"].astype(float).mean(1)
    loss = arrays["loss"].astype(np.float32)
    return Log(Path(path), meta, np.stack(views).astype(float),
               np.stack([sweep.mean(1) / meta["static_macs"], quality]),
               float(loss.mean() if text else right.mean()), arrays["label"], right, loss,
               arrays.get("token_macs") if text else None, arrays.get("difficulty"))


def by_method(logs):
    """{method: its logs}, of logs in the order of `gather`"""
    runs = itertools.groupby(logs, lambda log: log.meta["name"])
    return {method: list(group) for method, group in runs}


def static_logs(logs):
    """The logs of the static network, if they hold its loss."""
    return [log for log in logs if log.meta["name"] == STATIC and log.loss is not None]


def per_example(values):
    """values (N, ...) -> means (N,)."""
    return values.reshape(len(values), -1).mean(1)


def find(paths):
    """Files and folders -> paths of logs."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        inside = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: no logs (*.npz) in this folder")
        found |= dict.fromkeys(inside)
    return list(found)


def differing(had, wanted, keys):
    """Of two configurations what differs, in words."""
    return [f"{key} {had.get(key)}, not {wanted.get(key)}" for key in sorted(keys)
            if key not in ("seed", "data", "out", "device", "compile")
            and had.get(key) != wanted.get(key)]


def in_common(log):
    """What logs must have in common to be compared; None where a log does not say."""
    config = log.meta.get("options", {})
    return {"data set": log.meta["dataset"], "size": log.meta["size"],
            "test split": log.meta["test_sha256"], "number of examples": len(log.macs),
            "order of labels": log.label, "order of difficulties": log.difficulty,
            "number of epochs": config.get("epochs"), "number of steps": config.get("steps")}


def gather(paths):
    """Load logs, refuse what cannot be compared -> list in order of method and seed."""
    logs, known, seen, configs = [load(path) for path in paths], {}, {}, {}
    for log in logs:
        for what, mine in in_common(log).items():
            if mine is None:
                continue
            other, whose = known.setdefault(what, (mine, log.path))
            if not np.array_equal(mine, other):
                values = f" ({str(mine)[:12]}, not {str(other)[:12]})" * (np.ndim(mine) == 0)
                raise UserError(f"{log.path}: its {what} is not that of {whose}{values}")
        run = log.meta["name"], log.meta["seed"]
        if run in seen:
            raise UserError(f"{log.path}: the same method and seed as {seen[run]}")
        seen[run] = log.path
        mine = log.meta.get("options", {})
        other, whose = configs.setdefault(log.meta["name"], (mine, log.path))
        if differs := differing(mine, other, mine.keys() & other.keys()):
            raise UserError(f"{log.path}: was trained with {'; '.join(differs)} as {whose} was")
    order = list(dict.fromkeys([*METHODS, *sorted({method for method, _ in seen})]))
    return sorted(logs, key=lambda log: (order.index(log.meta["name"]), log.meta["seed"]))


# --- Statistics -----------------------------------------------------------------------------------

def midranks(x):
    """x (N,) -> ranks from 1 to N, equal values sharing the mean of theirs."""
    return midranks_of_codes(np.unique(x, return_inverse=True)[1])


def midranks_of_codes(code):
    """midranks of small integers from 0 upwards, counted instead of sorted."""
    count = np.bincount(code)
    return (np.cumsum(count) - (count - 1) / 2)[code]       # the last rank of a value, less half


def ranked(columns):
    """Midranks of each of the columns (N, L)."""
    return np.stack([midranks(x) for x in columns.T], 1)


def correlate(columns):
    """columns (N, L) -> Pearson correlations (L, L); NaN for a column that is constant."""
    return np.corrcoef(columns, rowvar=False)


def spearman(x, y):
    """Spearman's rho of x and y (N,): Pearson's of midranks. NaN if either is constant."""
    return correlate(ranked(np.stack([x, y], 1)))[0, 1]


def tie_ceilings(columns):
    """The highest and the lowest rho (2, L, L) that the ties of the columns (N, L) allow: both
    sorted, in the same and in opposite directions."""
    in_order = np.sort(ranked(columns), axis=0)
    L = in_order.shape[1]
    both = correlate(np.concatenate([in_order, in_order[::-1]], 1))
    return np.stack([both[:L, :L], both[:L, L:]])


def within_class(columns, label, least=30):
    """Mean (L, L) over the classes of rho in each; classes of fewer than `least` examples, and a
    column where it is constant in a class, stay out of the mean."""
    names, counts = np.unique(label, return_counts=True)
    each = [correlate(ranked(columns[label == name])) for name in names[counts >= least]]
    each = np.reshape(each, (-1, columns.shape[1], columns.shape[1]))
    told = np.isfinite(each).sum(0)
    return np.nansum(each, 0) / np.where(told, told, np.nan)


def partial(columns, classes, covariates=()):
    """Correlations (L, L) of the residuals that least squares leaves of midranks, given class
    indicators (a list of (N,)) and the midranks of `covariates` (a list of (N,))."""
    design = [np.ones((len(columns), 1))]
    design += [label[:, None] == np.unique(label) for label in classes]
    design += [midranks(x)[:, None] / len(x) for x in covariates]
    design, ranks = np.concatenate(design, 1).astype(float), ranked(columns)
    residual = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    residual[:, (residual ** 2).sum(0) < 1e-9 * (ranks ** 2).sum(0)] = np.nan   # explained away
    return correlate(residual)


def membership(x, k):
    """How much each example of x (N,) belongs to the k largest; examples that tie for the last
    places share them."""
    threshold = np.sort(x)[-k]
    above, equal = x > threshold, x == threshold
    return above + equal * (k - above.sum()) / equal.sum()


def top_overlap(columns, k):
    """Shares (L, L) of the k costliest examples that two columns (N, L) have in common; by chance
    k / N. NaN for a constant column."""
    member = np.stack([membership(x, k) if np.ptp(x) > 0 else np.full(len(x), np.nan)
                       for x in columns.T], 1)
    return member.T @ member / k


def pairs_on(columns, keep, seed, least=30):
    """rho (L, L) of each pair of columns (N, L) of different seeds (L,) over the examples that both
    keep (N, L); NaN if they are fewer than `least`."""
    L = columns.shape[1]
    rho = np.full((L, L), np.nan)
    for i, j in itertools.combinations(range(L), 2):
        both = keep[:, i] & keep[:, j]
        if seed[i] != seed[j] and both.sum() >= least:
            rho[i, j] = rho[j, i] = spearman(columns[both, i], columns[both, j])
    return rho


class Agreement(NamedTuple):
    """All (A, A). The diagonals of raw, low and high are about a method's own seeds."""
    raw: np.ndarray             # mean rho over seeds s != t
    low: np.ndarray             # and its extremes
    high: np.ndarray
    disattenuated: np.ndarray


def agreement(rho, member, seed, known=()):
    """rho (..., L, L) between logs -> Agreement between the rankings that they are runs of.

    member (L,): which ranking a log is a run of. seed (L,): two runs are compared only if theirs
    differ. known: {ranking: reliability} of those whose seeds do not tell it. NaN stands for what
    cannot be told: no pair of different seeds, or one of the logs is constant."""
    A = max(member) + 1
    member, seed = np.asarray(member), np.asarray(seed)
    raw, low, high = np.full((3, *rho.shape[:-2], A, A), np.nan)
    for a, b in itertools.product(range(A), repeat=2):
        apart = ((member == a)[:, None] & (member == b)) & (seed[:, None] != seed)
        if apart.any():
            values = rho[..., apart]
            raw[..., a, b] = values.mean(-1)
            low[..., a, b], high[..., a, b] = values.min(-1), values.max(-1)
    for a, reliability in dict(known).items():
        raw[..., a, a] = reliability
    own = np.diagonal(raw, axis1=-2, axis2=-1)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    return Agreement(raw, low, high, raw / (scale[..., :, None] * scale[..., None, :]))


def bootstrap(columns, resamples=1000, block=1, seed=0):
    """Yield rho (L, L) of samples of the rows of columns (N, L), drawn with replacement in blocks
    of neighbours. The values are sorted once, into codes; ranking those takes no sorting."""
    rng, block = np.random.default_rng(seed), min(block, len(columns) // 10)
    blocks = len(columns) // block
    codes = np.stack([np.unique(x, return_inverse=True)[1] for x in columns.T])
    for _ in range(resamples):
        first = block * rng.integers(blocks, size=blocks)
        rows = (first[:, None] + np.arange(block)).ravel()
        yield correlate(np.stack([midranks_of_codes(code) for code in codes[:, rows]], 1))


def entropy(counts):
    """counts (N, K) of how people labelled each example -> nats (N,)."""
    p = counts / counts.sum(1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


def split_half(counts, repeats=10, seed=0):
    """Reliability of the entropy of counts (N, K): rho between two halves of the people, stepped up
    to all of them (Spearman-Brown, 2 r / (1 + r))."""
    rng, rho = np.random.default_rng(seed), []
    for _ in range(repeats):
        half = np.stack([rng.multivariate_hypergeometric(row, row.sum() // 2) for row in counts])
        rho.append(spearman(entropy(half), entropy(counts - half)))
    return 2 * np.mean(rho) / (1 + np.mean(rho))


# --- The study ------------------------------------------------------------------------------------

class Rankings(NamedTuple):
    """Compute or hardness of N examples, in L columns: runs of methods, then of references."""
    names: list             # of A rankings, the methods first
    methods: int            # how many of them are methods
    member: np.ndarray      # (L,) ranking of each column
    seed: np.ndarray        # (L,)
    known: dict             # {ranking: reliability} where it is known otherwise
    same_seed: bool         # no two methods have different seeds: they are compared all the same
    columns: np.ndarray     # (N, L)

    def agreement(self, rho):
        return agreement(rho, self.member, self.seed, self.known)

    def excuses(self):
        """Why a ranking has no numbers: "constant", "not reached", or "" for one that has."""
        words = [""] * len(self.names)
        for column, member in zip(self.columns.T, self.member):
            if not np.ptp(column) > 0:
                words[member] = "not reached" if np.isnan(column).any() else "constant"
        return words


def rankings(logs, compute, references=()):
    """compute: log -> (N,). references: (name, seeds, list of (N,), known reliability or None)."""
    rows = [(method, [log.meta["seed"] for log in runs], [compute(log) for log in runs], None)
            for method, runs in by_method(logs).items()]
    methods, same_seed = len(rows), len({log.meta["seed"] for log in logs}) == 1
    names, seeds, columns, known = zip(*rows, *references)
    seed, member = np.concatenate(seeds), np.repeat(range(len(names)), list(map(len, seeds)))
    return Rankings(list(names), methods, member, np.arange(len(seed)) if same_seed else seed,
                    {a: known[a] for a in range(len(names)) if known[a] is not None}, same_seed,
                    np.stack([*itertools.chain(*columns)], 1).astype(float))


def study(table, classes, covariates, right, resamples=1000, block=1):
    """Everything about one set of Rankings -> dict of Agreement; `interval` holds those of the
    bootstrap, `ceiling` (A, A) the rho farthest from 0, on its side, that ties allow.

    classes: list of (N,), held fixed by the partial correlation; the first also for the mean within
    classes. covariates: list of (N,), held fixed as well. right: (N, methods' L) bool, or None."""
    columns, (N, L) = table.columns, table.columns.shape
    sampled = tqdm(bootstrap(columns, resamples, block), "bootstrap", resamples, leave=False)
    rho = dict(all=correlate(ranked(columns)), interval=np.stack(list(sampled)),
               overlap=top_overlap(columns, N // 10))
    if classes:
        rho["within class"] = within_class(columns, classes[0])
    if classes or covariates:
        rho["partial"] = partial(columns, classes, covariates)
    if right is not None:
        for name, keep in ("both right", right), ("both wrong", ~right):
            keep = np.pad(keep, ((0, 0), (0, L - keep.shape[1])), constant_values=True)
            rho[name] = pairs_on(columns, keep, table.seed)
    rho["shuffled"] = correlate(ranked(shuffle(columns, np.zeros(N))))
    if classes:
        rho["class alone"] = correlate(ranked(shuffle(columns, classes[0])))
    found = {name: table.agreement(matrix) for name, matrix in rho.items()}
    highest, lowest = table.agreement(tie_ceilings(columns)).raw
    return found | dict(ceiling=np.where(found["all"].raw < 0, lowest, highest))


def shuffle(columns, label, seed=0):
    """Each of the columns (N, L) in a random order of its own, inside the classes of label (N,):
    what is left is what the class brings about, or chance if there is but one."""
    rng, columns = np.random.default_rng(seed), columns.copy()
    for name in np.unique(label):
        columns[label == name] = rng.permuted(columns[label == name], axis=0)
    return columns


def typical(matrix, which):
    """Median, lowest and highest over the pairs of rankings `which` of matrix (..., A, A), without
    the pairs that have no number."""
    pairs = np.stack([matrix[..., a, b] for a, b in itertools.combinations(which, 2)])
    return [f(pairs, 0) for f in (np.nanmedian, np.nanmin, np.nanmax)]


def strongest(table, found):
    """The kind of agreement that the number of seeds allows."""
    full = found["all"].disattenuated
    return "disattenuated" if np.isfinite(typical(full, range(table.methods))[0]) else "raw"


def deciders(names):
    """Indices of the methods that choose their compute, or of all if those are fewer than two."""
    some = [i for i, name in enumerate(names) if name != STATIC]
    return some if len(some) > 1 else list(range(len(names)))


def word(rho, lowest=0.0, highest=0.0):
    """The words for an agreement of rho, the median of pairs from the lowest to the highest, all as
    they are printed; divided where both ends are strong."""
    rho, lowest, highest = np.round([rho, lowest, highest], 2)
    if lowest < -0.4 and highest >= 0.7:
        return "are divided"
    return "cannot be compared yet" if np.isnan(rho) else next(w for t, w in WORDS if rho >= t)


# --- Report ---------------------------------------------------------------------------------------

def number(x, digits=2):
    """x with so many digits, or "unknown" where it is NaN."""
    return "unknown" if np.isnan(x) else f"{round(float(x), digits) + 0.0:.{digits}f}"   # no -0.00


def between(x, low, high, digits=2, brackets="()"):
    """x (low to high), or x alone where the others cannot be told."""
    if np.isnan([x, low, high]).any():
        return number(x, digits)
    return (f"{number(x, digits)} {brackets[0]}{number(low, digits)} to "
            f"{number(high, digits)}{brackets[1]}")


def spread(values, digits=2):
    """Mean (lowest to highest)."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return number(values[0], digits)
    return between(values.mean(), values.min(), values.max(), digits)


def markdown(header, rows):
    """Strings -> the lines of a Markdown table, and an empty one."""
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def listed(names):
    """a, b and c."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def pair_rows(table, cells):
    """A row per pair of methods: cells(i, j), or why one of the two has no numbers."""
    why, rows = table.excuses(), []
    for i, j in itertools.combinations(range(table.methods), 2):
        row, excuse = cells(i, j), why[i] or why[j]
        row = [excuse] + [""] * (len(row) - 1) if excuse else row
        rows.append([f"{table.names[i]}, {table.names[j]}", *row])
    return rows


def pair_tables(table, found):
    """Two tables, raw and disattenuated."""
    extra = [k for k in ("within class", "partial", "both right", "both wrong") if k in found]
    a, top = found["all"], found["ceiling"]
    low, high = np.nanpercentile(found["interval"].disattenuated, [2.5, 97.5], axis=0)
    raw = pair_rows(table, lambda i, j: [
        between(a.raw[i, j], a.low[i, j], a.high[i, j]), number(top[i, j]),
        number(a.raw[i, j] / abs(top[i, j])), *(number(found[k].raw[i, j]) for k in extra),
        number(found["overlap"].raw[i, j])])
    full = pair_rows(table, lambda i, j: [
        between(a.disattenuated[i, j], low[i, j], high[i, j], brackets="[]"),
        *(number(found[k].disattenuated[i, j]) for k in extra)])
    of = "the same seed: more alike than others" if table.same_seed else "different seeds"
    chance = "; ".join(
        f"{name} {number(typical(found[key].raw, range(table.methods))[0])}" for key, name in
        (("shuffled", "examples shuffled"), ("class alone", "shuffled inside classes"))
        if key in found)
    return [f"Raw rho, mean (lowest to highest) over pairs of runs of {of}:", "",
            *markdown(["pair", "rho", "tie ceiling", "share of it", *extra, "costliest 10 %"], raw),
            "Disattenuated, each column by reliabilities of its own kind [95 % over examples]:", "",
            *markdown(["pair", "all", *extra], full), f"By chance, median raw rho: {chance}.", ""]


def view_table(views, kind):
    """The agreement of every pair at every budget, and of every method with itself."""
    columns = [pair_rows(table, lambda i, j: [number(getattr(agree, kind)[i, j])])
               for table, agree in views.values()]
    own = [[f"{name}, its own seeds (raw)", *(table.excuses()[m] or number(agree.raw[m, m])
                                             for table, agree in views.values())]
           for m, name in enumerate(next(iter(views.values()))[0].names)]
    return markdown(["pair", *views], [[rows[0][0], *(row[1] for row in rows)]
                                       for rows in zip(*columns)] + own)


def reference_table(table, agree):
    """Every method against every outside reference: raw, and disattenuated."""
    why, methods, rows = table.excuses(), range(table.methods), []
    for r in range(table.methods, len(table.names)):
        rows.append([table.names[r], number(agree.raw[r, r]), *(
            why[m] or f"{number(agree.raw[m, r])} / {number(agree.disattenuated[m, r])}"
            for m in methods)])
    return markdown(["reference", "its reliability", *table.names[:table.methods]], rows)


def method_table(logs, table, found):
    """What each method was asked for, spent and reached, and how reliable its ranking is."""
    rows, a, why = [], found["all"], table.excuses()
    better = "loss" if logs[0].text else "accuracy"
    low, high = np.nanpercentile(found["interval"].raw, [2.5, 97.5], axis=0)
    for i, (name, runs) in enumerate(by_method(logs).items()):
        reliability = why[i] or between(a.raw[i, i], a.low[i, i], a.high[i, i])
        if np.isfinite(a.raw[i, i]):
            reliability += f" [{number(low[i, i])} to {number(high[i, i])}]"
        rows.append([name, ", ".join(str(log.meta["seed"]) for log in runs),
                     ", ".join({str(log.meta.get("options", {}).get("budget", "none"))
                                for log in runs}),
                     spread([log.cost.mean() for log in runs], 3),
                     spread([log.quality for log in runs], 4),
                     spread([log.curve[1, -1] for log in runs], 4),
                     f"{np.median([len(np.unique(log.macs)) for log in runs]):,.0f}", reliability])
    return markdown(["method", "seeds", "budget wanted", "MACs, share of dense", better,
                     f"{better}, full model", "distinct costs",
                     "reliability (over seeds) [95 % over examples]"], rows)


def static_table(logs):
    """Static networks of all widths and depths, trained alike: what MACs buy."""
    networks = by_method(log for log in logs if log.meta.get("script") == STATIC)
    full = networks.get(STATIC, [None])[0]
    rows = []
    for name, runs in sorted(networks.items(), key=lambda item: -item[1][0].meta["static_macs"]):
        options, macs = runs[0].meta.get("options", {}), runs[0].meta["static_macs"]
        share = number(macs / full.meta["static_macs"]) if full else "unknown"
        minutes = [(log.meta.get("seconds") or np.nan) / 60 for log in runs]
        rows.append([name, str(options.get("width")), str(options.get("depth")),
                     f"{macs / 1e6:.2f} M", share, spread(minutes, 1),
                     ", ".join(str(log.meta["seed"]) for log in runs),
                     spread([log.curve[1, -1] for log in runs], 4)])
    better = "loss" if logs[0].text else "accuracy"
    return markdown(["static network", "width", "depth", "MACs", "share", "minutes of training",
                     "seeds", f"test {better}"], rows)


def neurons(logs):
    """Do hard examples activate more neurons or fewer? From the logs of STATIC."""
    rho = [spearman(log.macs, per_example(log.loss)) for log in static_logs(logs)]
    if not rho:
        return "Whether hard examples activate more neurons is unknown: no log of a static network."
    mean = np.mean(rho)
    answer = ("unknown, it is constant" if np.isnan(mean) else "more" if mean > 0.05 else
              "fewer" if mean < -0.05 else "neither")
    return ("Do hard examples activate more neurons of the static ReLU network, or fewer? "
            f"{answer.capitalize()}: raw rho of its compute with its own loss is {spread(rho)}.")


def one_sentence(table, matrix, kind, subject):
    """The answer. matrix (A, A): rho of that kind."""
    names, every = table.names[:table.methods], range(table.methods)
    some, pairs = deciders(names), matrix[np.triu_indices(table.methods, 1)]
    told, (middle, low, high) = np.isfinite(pairs).sum(), typical(matrix, every)
    part = "pairs" if told == len(pairs) else f"{told} of {len(pairs)} pairs"
    answer = (f"On {subject}, {listed(names)} {word(middle, low, high)} on "
              f"which ones deserve the most compute: the median {kind} rho of their rankings is "
              f"{number(middle)} ({part}: {number(low)} to {number(high)}).")
    if len(some) < len(names):
        inner = typical(matrix, some)
        answer += (" Without the static network, which decides nothing, the others "
                   f"{word(*inner)}") + ("." if np.isnan(inner[0]) else f": {between(*inner)}.")
    return answer


def other_budgets(views, kind, some, names):
    """Whether the answer for the methods `some` is the same in all views."""
    answers, texts = {}, []
    for name, (view, agree) in views.items():
        middle, low, high = typical(getattr(agree, kind), some)
        if np.isfinite(middle):
            answers[word(middle, low, high)] = None         # a set that keeps its order
        gone = [names[i] for i in some if view.excuses()[i]]
        texts.append(f"{name} {number(middle)}" + (f" (without {listed(gone)})" if gone else ""))
    verdict = ("is unknown", "stays", f"changes ({', '.join(answers)})")[min(len(answers), 2)]
    return (f"At other budgets the answer for {listed(names[i] for i in some)} {verdict}; medians: "
            f"{', '.join(texts)}.")


def first_screen(logs, table, found, views, unit):
    """The answer, before any table."""
    names, every, kind = table.names[:table.methods], range(table.methods), strongest(table, found)
    matrix, subject = getattr(found["all"], kind), f"{len(logs[0].macs):,} {unit}"

    def median(key, kind=kind):
        return number(typical(getattr(found[key], kind), every)[0])

    if kind == "disattenuated":
        sampled = typical(found["interval"].disattenuated, every)[0]
        low, high = np.nanpercentile(sampled, [2.5, 97.5])
        lines = [f"95 % interval of the median, over {unit}, with these seeds fixed: "
                 f"{number(low)} to {number(high)}."]
        loose = [names[i] for i in every if found["all"].low[i, i] <= 0]
        if loose:
            lines.append(f"Not all seeds of {listed(loose)} agree with one another (some two have "
                         "a rho of 0 or less): disattenuated rhos with it are rough, whatever the "
                         "intervals.")
    else:
        same_seed = ", and of runs of the same seed, which are more alike than others"
        single = np.isnan(np.diagonal(found["all"].raw)[:table.methods]).any()
        why = ("Reliability is unknown: it takes two seeds of each method" if single else
               "Reliability is not above 0: seeds of one method do not agree")
        lines = [f"{why}. So the rho is raw{same_seed if table.same_seed else ''}."]
    share = typical(found["all"].raw / np.abs(found["ceiling"]), every)[0]
    lines.append(f"Raw rho: median {median('all', 'raw')}, {number(share)} of the largest that "
                 "ties allow. Overlap of the costliest 10 %: "
                 f"{median('overlap', 'raw')} (by chance "
                 "0.10).")
    pairs = [(matrix[a, b], f"{names[a]} and {names[b]} ({number(matrix[a, b])})")
             for a, b in itertools.combinations(every, 2) if np.isfinite(matrix[a, b])]
    if pairs:
        pairs.sort(reverse=True)
        kinds = Counter(word(rho) for rho, _ in pairs)
        lines.append(f"Of the {len(pairs)} pairs "
                     f"{', '.join(f'{count} {words}' for words, count in kinds.items())}.")
        lines.append(f"Most alike: {pairs[0][1]}. Least alike: {pairs[-1][1]}.")
    same = [f"{text} {median(key)}" for key, text in (
        ("within class", "within classes"), ("both right", "where both answer right"),
        ("both wrong", "where both answer wrong"), ("partial", "with covariates held fixed"))
        if key in found]
    lines += [f"Median {kind} rho: {', '.join(same)}."] if same else []
    lines.append(neurons(logs))
    if "people" in table.names:
        r = table.names.index("people")
        raw, full = (number(np.nanmedian(m[:table.methods, r]))
                     for m in (found["all"].raw, found["all"].disattenuated))
        lines.append(f"With people: median rho {raw}, disattenuated {full}. Errors of published "
                     "networks with people: 0.34 and 0.43.")
    methods = by_method(logs)
    spent = [f"{name} {spread([log.cost.mean() for log in runs], 3)}, "
             f"{spread([log.quality for log in runs], 3)}" for name, runs in methods.items()]
    seeds = sorted({len(runs) for runs in methods.values()})
    lines += [other_budgets(views, kind, deciders(names), names),
              "Mean MACs, as shares of the dense ones, and the "
              f"{'loss' if logs[0].text else 'accuracy'} reached: {'; '.join(spent)}.",
              f"Seeds per method: {listed(map(str, seeds))}. n = {subject}."]
    return [f"# Do they agree on what is hard? {logs[0].group}", "",
            f"**{one_sentence(table, matrix, kind, subject)}**", "",
            *(f"* {line}" for line in lines), ""]


HOW_TO_READ = f"""
## How to read this

Words, by rho: {'; '.join(f'from {t:.2f} {w}' for t, w in WORDS[:-1])}; below that {WORDS[-1][1]}.
*Are divided*: some pair is below -0.40, and another at 0.70 or above.
For scale, from published predictions on CIFAR-10's test images and the labels of CIFAR-10H: errors
of two families of CNN agree at 0.80 to 0.88 (disattenuated), a CNN and random features at 0.55,
people and machines at 0.43.

*Raw*: Spearman's rho with midranks, mean over pairs of runs of different seeds. *Tie ceiling*: the
rho farthest from 0, on the side of the raw one, that equal costs allow. *Reliability*: rho between
seeds of one method; for people between random halves of them, stepped up to all.
*Disattenuated*: raw, divided by the root of the product of both reliabilities; 1 means that the
methods differ no more than their own seeds do, and noise can carry it beyond. *Within class*: mean
of the rhos inside each class. *Partial*: correlation of what is left of the ranks when class,
the static network's loss and brightness (images), the static network's loss (windows of text), or
that, the character read and its position (per token) are regressed out, as far as the logs and the
data at hand tell them.
*Costliest 10 %*: share in common of the costliest tenth; ties share their places; chance is 0.10.
*At {', '.join(f'{b:.2f}' for b in BUDGETS)}*: costs interpolated between neighbouring thresholds
of the sweep so that their mean is that share of the dense MACs; *not reached*: no threshold of the
sweep spends so much, or so little. *Sweep average*: mean cost over all thresholds. *Constant*:
every example costs the same, so there is no ranking. *Unknown*: too few seeds, reliability not
above 0, or nothing left of the ranks or of the examples to compare.
""".strip().splitlines()


# --- Pictures -------------------------------------------------------------------------------------

def colour(names):
    """A colour per method, the same in every picture and whichever methods are there."""
    order = list(dict.fromkeys([*METHODS, *names]))
    return {name: f"C{order.index(name) % 10}" for name in names}


def canvas(caption, width, height, *grid, **options):
    """A figure of so many inches, and its axes in a grid (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(caption)
    return figure, figure.subplots(*grid, **options)


def draw_agreement(table, found):
    """Disattenuated above the diagonal, raw and its tie ceiling below, reliability on it."""
    A, a, why = len(table.names), found["all"], table.excuses()
    figure, axis = canvas("agreement of the rankings by compute", 3.5 + 1.15 * A, 2.4 + 0.95 * A)
    shown = np.where(np.tri(A, dtype=bool), a.raw, a.disattenuated)
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.75)
    for (i, j), rho in np.ndenumerate(shown):
        text = why[i] or why[j] or number(rho)
        if j < i and np.isfinite(rho):
            text += f"\nof {number(found['ceiling'][i, j])}"
        axis.text(j, i, text, ha="center", va="center", fontsize=9,
                  weight="bold" if i == j else "normal",
                  color="white" if abs(rho) > 0.8 else "black")
    if table.methods < A:
        axis.axhline(table.methods - 0.5, color="black")
        axis.axvline(table.methods - 0.5, color="black")
    axis.set_xticks(range(A), table.names, rotation=30, ha="right")
    axis.set_yticks(range(A), table.names)
    axis.set_title("above the diagonal: disattenuated; on it: reliability between seeds;\n"
                   "below: raw rho, of what ties allow", fontsize=10)
    figure.colorbar(image, label="Spearman's rho", shrink=0.8)
    return figure


def band(axis, x, rows, shade, name):
    """Mean over seeds, and from the lowest to the highest of them: rows (seeds, len(x))."""
    axis.plot(x, np.mean(rows, 0), lw=1.8, color=shade, label=name)
    axis.fill_between(x, np.min(rows, 0), np.max(rows, 0), color=shade, alpha=0.2, lw=0)


def draw_quality(logs):
    """Accuracy or loss against MACs at every point of the sweep, mean and spread over seeds."""
    figure, axis = canvas("what compute buys", 8, 5.5)
    methods, text = by_method(logs), logs[0].text
    for name, shade in colour(methods).items():
        runs = methods[name]
        curves = [log.curve[:, np.argsort(log.curve[0], kind="stable")] for log in runs]
        points = np.concatenate(curves, 1)
        axis.plot(*points, "o", ms=3.5, color=shade)
        macs = np.linspace(points[0].min(), points[0].max(), 300)           # NaN: not in all seeds
        band(axis, macs, [np.interp(macs, *curve, np.nan, np.nan) for curve in curves], shade, name)
        axis.plot(np.mean([log.cost for log in runs]), np.mean([log.quality for log in runs]),
                  "D", ms=8, mfc="none", color=shade)
    if STATIC in methods:
        dense = np.mean([log.curve[1, -1] for log in methods[STATIC]])
        axis.plot(1, dense, "*", color="black", ms=14, label="static network")
        axis.axhline(dense, color="black", lw=0.5, ls=":")
    # A few thresholds destroy the model; showing them all would flatten the rest.
    values = np.concatenate([log.curve[1] for log in logs])
    good, bad = np.percentile(values, [10, 60] if text else [90, 40])
    worst, low, high = bad + 4 * (bad - good), values.min(), values.max()
    axis.set_ylim((low if text else max(low, worst)) - 0.02,
                  (min(high, worst) if text else high) + 0.02)
    axis.plot([], [], "D", mfc="none", color="grey", label="as logged")
    axis.set(title="dots: thresholds; bands: lowest to highest seed",
             xlabel="mean MACs per example, share of the static network's",
             ylabel="loss, nats per character (lower is better)" if text else "test accuracy")
    axis.legend()
    return figure


def draw_deciles(logs, panels):
    """Mean compute by decile of a hardness. panels: (name, hardness (M,), list of costs (M,) as
    shares of the dense MACs, NaN for examples that do not count), one panel each."""
    figure, axes = canvas("what easy and hard examples cost", 1.5 + 4.5 * max(2, len(panels)), 4.5,
                          1, len(panels), sharey=True, squeeze=False)
    place = range(1, 11)
    for axis, (name, hardness, costs) in zip(axes[0], panels):
        deciles, means = np.array_split(np.argsort(hardness, kind="stable"), 10), {}
        for log, cost in zip(logs, costs):
            row = [np.nanmean(cost[d]) if np.isfinite(cost[d]).sum() >= 10 else np.nan
                   for d in deciles]
            means.setdefault(log.meta["name"], []).append(row)
        for method, shade in colour(means).items():
            band(axis, place, means[method], shade, method)
        axis.set(title=name, xlabel="decile, easy to hard", xticks=place, xlim=(0.5, 10.5))
    axes[0, 0].set_ylabel("mean MACs, share of the static network's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8,
                  title_fontsize=8, title="bands: lowest to highest seed;\n"
                  "no line: fewer than 10 in a decile")
    return figure


def percentiles(table):
    """Rankings -> (N, methods): percentile of each cost, mean over seeds."""
    ranks, member = 100 * (ranked(table.columns) - 0.5) / len(table.columns), table.member
    return np.stack([ranks[:, member == m].mean(1) for m in range(table.methods)], 1)


def extremes(share, names):
    """share (N, methods) percentiles -> {heading: order of the examples}: by the highest percentile
    that a method which chooses its compute gives them, by the lowest, and by how they differ."""
    some = deciders(names)
    share, who = share[:, some], listed(names[i] for i in some)
    return {f"cheapest for {who} together": np.argsort(share.max(1), kind="stable"),
            f"costliest for {who} together": np.argsort(-share.min(1), kind="stable"),
            f"most disputed by {who}": np.argsort(-share.std(1), kind="stable")}


def show(axis, image, title):
    """An image (3, 32, 32) without axes."""
    axis.imshow(image.transpose(1, 2, 0))
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def draw_strips(table, images, labels, count=10):
    """Three strips of images (N, 3, 32, 32), each with a bar per method: its percentile."""
    share, names = percentiles(table), table.names[:table.methods]
    figure = Figure(figsize=(1.35 * count, 9), layout="constrained")
    figure.suptitle("images cheapest and costliest for all that choose, and most disputed")
    parts, colours = figure.subfigures(4, 1, height_ratios=(4, 4, 4, 0.6)), colour(names)
    for part, (name, order) in zip(parts, extremes(share, names).items()):
        axes = part.subplots(2, count, height_ratios=(1, 0.55))
        part.suptitle(name, fontsize=11)
        for top, bottom, i in zip(*axes, order[:count]):
            show(top, images[i], labels[i])
            bottom.bar(range(len(names)), share[i], color=colours.values())
            bottom.set(ylim=(0, 100), xticks=[], yticks=[0, 50, 100])
            bottom.tick_params(labelleft=bottom is axes[1, 0], labelsize=7)
        axes[1, 0].set_ylabel("percentile\nof cost", fontsize=8)
    parts[3].legend(handles=[Patch(color=colours[n], label=n) for n in names], loc="center",
                    ncols=len(names), frameon=False)
    return figure


def draw_one_class(logs, images, labels, count=5):
    """Images (N, 3, 32, 32) of one class, whichever: a row per method, on the left those that cost
    it least, on the right those that cost it most, with their MACs."""
    methods, kind = by_method(logs), sorted(set(labels))[len(set(labels)) // 2]
    members = np.flatnonzero(np.array(labels) == kind)
    caption = (f"the {kind} images that cost each method least, and most (MACs, share of the dense "
               "ones, mean over seeds)")
    figure, axes = canvas(caption, 2.4 * count + 1, 1.45 * len(methods) + 0.6, len(methods),
                          2 * count + 1, width_ratios=[1] * count + [0.3] + [1] * count)
    for row, (method, runs) in zip(axes, methods.items()):
        cost = np.mean([log.cost for log in runs], 0)[members]
        order = np.argsort(cost, kind="stable")
        row[count].axis("off")
        for axis, i in zip(np.delete(row, count), [*order[:count], *order[-count:]]):
            show(axis, images[members[i]], f"{cost[i]:.3f}")
        row[0].text(-0.15, 0.5, method, transform=row[0].transAxes, rotation=90, fontsize=9,
                    ha="center", va="center")
    for middle, heading in (axes[0, count // 2], "least"), (axes[0, -1 - count // 2], "most"):
        middle.set_title(f"{heading}\n{middle.get_title()}", fontsize=9)
    return figure


def draw_passages(table, tokens, characters):
    """Three windows of text, the characters (N, T) coloured by the percentile of what each method
    spends on them: a line per method."""
    names, share = table.names[:table.methods], percentiles(tokens).reshape(*characters.shape, -1)
    figure, axes = canvas("on which characters each method spends its compute",
                          14, 2 + 0.33 * 3 * len(names), 3, 1)
    for axis, (name, order) in zip(axes, extremes(percentiles(table), names).items()):
        i, T = order[0], min(64, characters.shape[1])
        image = axis.imshow(share[i, :T].T, cmap="viridis", vmin=0, vmax=100, alpha=0.6,
                            aspect="auto")
        for t, m in itertools.product(range(T), range(len(names))):
            sign = chr(characters[i, t]).replace("\n", "↵").replace("$", r"\$")
            axis.text(t, m, sign, ha="center", va="center", family="monospace", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks([])
        axis.set_title(f"window {i}: {name}", fontsize=10)
    figure.colorbar(image, ax=axes, label="percentile of cost, among all characters")
    return figure


def draw_time(logs):
    """MACs and time as shares of the static network's: a pair of bars per method and batch size."""
    methods = by_method(log for log in logs if log.meta.get("wall_clock"))
    shades = [shade for name, shade in colour(by_method(logs)).items() if name in methods]
    figure, axes = canvas("MACs saved against time saved (rough where runs shared a machine)",
                          11, 4.5, 1, 2, sharey=True)
    for axis, batch in zip(axes, (1, 256)):
        def time(log):
            clock = log.meta["wall_clock"]
            return clock[f"skipping_ms_batch_{batch}"] / clock[f"static_ms_batch_{batch}"]

        for shift, share, hatch in (-0.2, lambda log: log.cost.mean(), ""), (0.2, time, "///"):
            values = [[share(log) for log in runs] for runs in methods.values()]
            mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, min, max))
            bars = axis.bar(np.arange(len(mean)) + shift, mean - 1, 0.38, bottom=1, hatch=hatch,
                            color=shades, edgecolor="white", capsize=3,
                            yerr=np.maximum([mean - low, high - mean], 0))
            axis.bar_label(bars, [f"{m:.2f}" for m in mean], padding=3, fontsize=9)
        axis.axhline(1, color="black", lw=1)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"batch of {batch}")
        axis.set_xticks(range(len(methods)), methods, rotation=20, ha="right")
    axes[0].set_ylabel("share of the static network's (log scale)\n"
                       "below 1: saved, above 1: lost")
    figure.legend(handles=[Patch(color="grey", label="MACs"), Patch(
        facecolor="grey", hatch="///", edgecolor="white", label="time")],
        loc="outside lower center", ncols=2, frameon=False)
    return figure


# --- Comparing ------------------------------------------------------------------------------------

def test_images(log, folder):
    """The test images that a log is about -> uint8 (N, 3, 32, 32) and names of the classes. Nothing
    is downloaded; the drawing and reading code is the static script's. Raises UserError."""
    dataset = log.meta["dataset"]
    if dataset == "cifar10" and not any(Path(folder, name).exists() for name in (
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz")):
        raise UserError(f"CIFAR-10 is not in {folder} (--data names another folder)")
    try:
        script = importlib.import_module(STATIC)
        data = script.load_data(script.options(["--dataset", dataset, "--data", str(folder),
                                                "--size", log.meta["size"], "--device", "cpu"]))
    except Exception as e:      # torch, the script, or the data: the report does without
        raise UserError(f"the test images could not be had ({e})")
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in data["test"]))
    if digest.hexdigest() != log.meta["test_sha256"]:
        raise UserError(f"the {dataset} in {folder} is not what the logs are about")
    return data["test"][0].numpy(), CLASSES[dataset]


def read_people(path, log):
    """Counts (N, 10) of how people labelled each test image. Raises UserError."""
    def refuse(why):
        raise UserError(f"{path}: {why}")

    if log.meta["dataset"] != "cifar10":
        refuse(f"--human is about cifar10, the logs about {log.meta['dataset']}")
    try:
        counts = np.load(path, allow_pickle=False).astype(float)
    except Exception as e:      # no file, or one that is something else
        refuse(f"is no array of counts, .npy ({e})")
    if counts.shape != (len(log.macs), 10):
        refuse(f"is no array of counts {(len(log.macs), 10)}: its shape is {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum(1).min() < 2:
        refuse("holds NaN, negative counts, or images that nobody, or one person, labelled")
    if (counts.argmax(1) == log.label).mean() < 0.5:
        refuse("people agree with fewer than half of the labels: not in the official order?")
    return counts.astype(np.int64)


def outside(logs, args):
    """What is known about the examples beside what they cost -> references for `rankings`, the test
    images and the names of their classes (or None), and what has to be left out of the report."""
    first, references, images, classes, left_out = logs[0], [], None, None, []
    difficulty = next((log.difficulty for log in logs if log.difficulty is not None), None)
    if difficulty is not None:
        references.append(("known difficulty", [-1], [difficulty], 1.0))
    if args.human:
        counts = read_people(args.human, first)
        references.append(("people", [-2], [entropy(counts)], split_half(counts)))
    if static := static_logs(logs):
        references.append(("static loss", *zip(*(
            (log.meta["seed"], per_example(log.loss).astype(float)) for log in static)), None))
    else:
        left_out.append(f"what needs the static network's loss: there is no {STATIC} log")
    if not first.text:
        try:
            images, classes = test_images(first, args.data)
        except UserError as e:
            left_out.append(f"strips of images, and brightness: {e}")
    return references, images, classes, left_out


def apart(what, by, hardness, costs, right):
    """Two panels for `draw_deciles`: examples answered right, and those answered wrong."""
    return [(f"{what} answered {how}, by {by}", hardness,
             [np.where(r == (how == "right"), cost, np.nan) for cost, r in zip(costs, right)])
            for how in ("right", "wrong")]


def per_token(logs, table):
    """The study again, of characters instead of windows -> lines of the report, pictures, panels
    for `draw_deciles`; nothing where labels, or token_macs of a log, are missing."""
    label = next((log.label for log in logs if log.label is not None), None)
    if label is None or any(log.tokens is None for log in logs):
        return [], {}, []
    read = np.append(32, label)[:-1].reshape(label.shape)               # windows join up
    (N, T), right = read.shape, [log.right.ravel() for log in logs]
    losses = [log.loss.ravel() for log in static_logs(logs)]
    losses = [np.mean(losses, 0)] if losses else []
    tokens = rankings(logs, lambda log: log.tokens.ravel())
    found = study(tokens, [read.ravel(), np.tile(np.arange(T), N)], losses,
                  np.stack(right, 1), 100, BLOCK * T)
    costs = [log.tokens.ravel() * (T / log.meta["static_macs"]) for log in logs]
    panels = [apart("characters", "static loss", loss, costs, right) for loss in losses]
    lines = ["## Per token", "", f"Over {N * T:,} characters, as logged; the class is the "
             f"character read. Intervals: 100 samples of stretches of {BLOCK} windows.", "",
             *pair_tables(tokens, found)]
    return lines, {"passages.png": draw_passages(table, tokens, read)}, sum(panels, [])


def report_static(logs, args):
    """Write the report of a folder that has static networks only -> its path, and its lines."""
    report = Path(args.out, "figures", logs[0].group, "report.md")
    report.parent.mkdir(parents=True, exist_ok=True)
    full = [log for log in logs if log.meta["name"] == STATIC]
    lines = [f"# Static networks, {logs[0].group}", "", neurons(full), "", *static_table(logs),
             "With logs of a second method in the folder, this report compares their rankings."]
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [report], lines


def compare(logs, smaller, args):
    """Write the report and its pictures -> their paths, and the first screen. smaller: logs of
    static networks of other sizes, which are no rankings."""
    first, text, costs = logs[0], logs[0].text, [log.cost for log in logs]
    unit = f"{'windows' if text else 'test images'} of {first.meta['dataset']}"
    references, images, classes, left_out = outside(logs, args)
    hardness = {name: np.mean(values, 0) for name, _, values, _ in references}
    covariates = [hardness["static loss"]] if "static loss" in hardness else []
    if images is not None:
        covariates.append(per_example(images.astype(np.float32)))       # brightness

    # Statistics: as logged, and at other budgets.
    right = [log.right for log in logs]
    table = rankings(logs, lambda log: log.macs, references)
    found = study(table, [] if text else [first.label], covariates,
                  None if text else np.stack(right, 1), block=BLOCK if text else 1)
    views = [rankings(logs, lambda log: log.views[i]) for i in range(len(VIEWS))]
    views = {name: (view, view.agreement(correlate(ranked(view.columns))))
             for name, view in zip(VIEWS, views)}
    screen, kind = first_screen(logs, table, found, views, unit), strongest(table, found)
    tables = ["## Methods", "", *method_table(logs, table, found), "## Static networks", "",
              *static_table(logs + smaller), "## Pairs", "",
              *pair_tables(table, found), "## At other budgets", "",
              f"{kind.capitalize()} rho:", "", *view_table(views, kind)]
    if references:
        tables += ["## Outside references", "", "Raw / disattenuated rho:", "",
                   *reference_table(table, found["all"])]

    # Pictures; on text the statistics per token.
    pictures = {"agreement.png": draw_agreement(table, found), "quality.png": draw_quality(logs)}
    panels = [(f"all {'windows' if text else 'images'}, by {by}", hard, costs)
              for by, hard in hardness.items() if text or by == "people"]
    if text:
        lines, more, per_character = per_token(logs, table)
        tables, pictures, panels = tables + lines, pictures | more, panels + per_character
        left_out += [] if lines else ["everything per token: labels, or token_macs of a log, are "
                                      "missing"]
    elif hardness:
        by = "known difficulty" if "known difficulty" in hardness else list(hardness)[-1]
        panels = apart("images", by, hardness[by], costs, right) + panels
    if panels:
        pictures["deciles.png"] = draw_deciles(logs, panels)
    if images is not None:
        labels = [classes[y] for y in first.label]
        pictures["one_class.png"] = draw_one_class(logs, images, labels)
        pictures["strips.png"] = draw_strips(table, images, labels)
    if any(log.meta.get("wall_clock") for log in logs):
        pictures["time.png"] = draw_time(logs)
    else:
        left_out.append("MACs against time: no log has wall_clock in its meta")

    folder = Path(args.out, "figures", first.group)
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(screen)
    for name, figure in pictures.items():
        lines.append(f"![{figure.get_suptitle()}]({name})")
        figure.suptitle(f"{first.group}: {figure.get_suptitle()}")
        figure.savefig(folder / name, dpi=120)
    lines += ["", f"Left out: {'; '.join(left_out)}.", ""] if left_out else [""]
    report = folder / "report.md"
    report.write_text("\n".join(lines + tables + HOW_TO_READ) + "\n", encoding="utf-8")
    return [report, *(folder / name for name in pictures)], screen


# --- Training what is missing ---------------------------------------------------------------------

def planned(args):
    """The runs that --train asks for -> existing logs, commands {path of the log: command} of the
    missing ones, names of scripts that are not there, and the device. Raises UserError for a log
    that was trained with other options."""
    finished, missing, device = [], {}, "cpu"
    absent = [name for name in METHODS if not (HERE / f"{name}.py").exists()]
    asked = {key: value for key, value in vars(args).items() if value is not None and key in (
        "dataset", "size", "data", "out", "device", "steps", "epochs", "budget")}
    for name, seed in itertools.product(METHODS, range(args.seeds)):
        if name in absent:
            continue
        script = importlib.import_module(name)      # knows its defaults, and what it would refuse
        options = {key: asked[key] for key in asked if name != STATIC or key != "budget"}
        flags = ["--seed", str(seed)]
        flags += itertools.chain(*((f"--{key}", str(value)) for key, value in options.items()))
        cfg = script.options(flags)
        device = cfg.device
        path = Path(args.out, "logs", f"{cfg.dataset}-{cfg.size}", f"{name}-s{seed}.npz")
        if not path.exists():
            missing[path] = [sys.executable, str(HERE / f"{name}.py"), *flags]
            continue
        had = load(path).meta.get("options", {})
        if other := differing(had, vars(cfg), had):
            raise UserError(f"{path}: was trained with {'; '.join(other)}: move it away, or take "
                            "another --out")
        finished.append(path)
    return finished, missing, absent, device


def run(command, threads, children):
    """Run a script on so many threads, its progress on a line of its own -> its exit status and
    the end of what it said."""
    said = deque(maxlen=5)
    with tqdm(bar_format="{desc}", leave=False) as line:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=dict(OMP_NUM_THREADS=str(threads)) | os.environ)
        children.append(child)
        for text in child.stdout:       # the \r of a progress bar ends a line, too
            if text.strip():
                said.append(text.rstrip())
                shown = f"{Path(command[1]).stem}, seed {command[3]}: {said[-1]}"
                line.set_description_str(shown[:110])
    return child.wait(), said


def train(args):
    """Run the scripts for the logs that are missing -> paths of all logs that are there, and the
    number of failures. The first bar counts runs, the lines below it are those of the running."""
    paths, missing, absent, device = planned(args)
    for name in absent:
        print(f"{name}.py is not in {HERE}: left out", file=sys.stderr)
    cores = os.cpu_count() or 1
    jobs = max(1, min(args.jobs or (min(cores, 4) if device == "cpu" else 1), len(missing)))
    failures, children = len(absent), []
    runs = dict(desc="runs", unit="run", total=len(paths) + len(missing), initial=len(paths))
    with tqdm(**runs) as bar, ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, command, max(1, cores // jobs), children): path
                   for path, command in missing.items()}
        try:
            for job in as_completed(running):
                (status, said), path = job.result(), running[job]
                if status == 0 and path.exists():
                    paths.append(path)
                else:
                    failures += 1
                    tqdm.write(f"{path.stem} failed (exit status {status}):\n"
                               + "\n".join(f"    {text}" for text in said), sys.stderr)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in running):       # a child may only just have begun
                for child in children:
                    child.terminate()
                time.sleep(0.1)
            raise
    return paths, failures


# --- Command line ---------------------------------------------------------------------------------

def inventory(args):
    """What to say when nothing was asked for."""
    folders = sorted(path for path in Path(args.out, "logs").glob("*") if any(path.glob("*.npz")))
    for folder in folders:
        names = sorted(path.stem for path in folder.glob("*.npz"))
        print(f"{folder}: {', '.join(names)}")
        if len({name.rsplit("-s", 1)[0] for name in names}) > 1:
            print(f"    python compare_rankings.py {folder}")
    if not folders:
        print("There are no logs yet.")
    print("To train what is missing, and compare (embedded images, nothing is downloaded):\n"
          "    python compare_rankings.py --train --dataset shapes --size small --seeds 2\n"
          "--help lists the options.")


def main(args):
    """Load or train, compare, write -> exit status."""
    if not args.logs and not args.train:
        inventory(args)
        return 0
    if args.seeds < 1 or args.jobs < 0:
        raise UserError("--seeds must be at least 1, --jobs not negative")
    if args.budget is not None and not 0 < args.budget <= 1:
        raise UserError("--budget is a share of the dense MACs, above 0 and up to 1")
    paths, failures = find(args.logs), 0
    if args.train:
        trained, failures = train(args)
        paths = list(dict.fromkeys(paths + sorted(trained)))
        if not paths:
            raise UserError("no run has left a log")
    every = gather(paths)
    smaller, logs = [], []
    for log in every:
        static = log.meta.get("script") == STATIC and log.meta["name"] != STATIC
        (smaller if static else logs).append(log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # what cannot be told becomes NaN
        if len(by_method(logs)) > 1:
            written, screen = compare(logs, smaller, args)
        elif all(log.meta.get("script") == STATIC for log in every):
            written, screen = report_static(every, args)
        else:
            raise UserError(f"{paths[0]}: logs of one method only; at least two are needed")
    print("\n".join(screen))
    print("wrote", *written)
    return 1 if failures else 0


def command_line():
    """Run main on what sys.argv asks for; a UserError is one line, exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: {message} (--help lists the options)\n")
    add = parser.add_argument
    add("logs", nargs="*", help="log files, or folders of them")
    add("--human", metavar="FILE", help="counts (N, 10) of how people labelled each image, .npy")
    add("--data", default="data", help="folder of the data sets, for the images of the report")
    add("--out", default=".", help="folder that receives figures/, and logs/ of --train")
    add("--train", action="store_true", help="first run the five scripts for the missing logs")
    add("--dataset", choices=(*CLASSES, *TEXTS), help="with --train (default: cifar10)")
    add("--size", choices=("tiny", "small", "base"),
        help="with --train (default: base on a GPU, else small)")
    add("--seeds", type=int, default=3,
        help="with --train: seeds 0 to N - 1 of each method (default: 3)")
    add("--budget", type=float, help="with --train: of the methods that have one")
    add("--steps", type=int, help="with --train: stop each run after so many steps")
    add("--epochs", type=float, help="with --train: passes over the training split")
    add("--device", choices=("cpu", "cuda"), help="with --train")
    add("--jobs", type=int, default=0, help="with --train: runs at once (the times that they log "
        "are rough then); 0: one on a GPU, else one for each core, up to four")
    sys.stdout.reconfigure(errors="replace")        # printing a path of any name never fails
    try:
        sys.exit(main(parser.parse_args()))
    except (UserError, OSError) as e:
        parser.exit(2, f"{parser.prog}: {e}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")


if __name__ == "__main__":
    command_line()
