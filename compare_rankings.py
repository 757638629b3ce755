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

The measure is Spearman's rho: the correlation of ranks, where equal costs share the mean of
their ranks. It is easily misread, so the report always sets it beside
  * the tie ceiling, the most that the two sets of equal costs allow: two methods with the very same
    idea of hardness and different shares of early exits may be unable to exceed 0.33;
  * the reliability of a method, rho between its own seeds, which bounds any agreement with others;
  * the disattenuated agreement, mean of rho(A_s, B_t) over seeds s != t, divided by the root of the
    product of both reliabilities (Spearman 1904). Never s = t: runs of one seed start from
    the same weights and see the same batches, which alone makes them alike;
  * the same within classes, with class, static loss and brightness regressed out, on examples that
    both answer right or both wrong, for the hardest tenth, and at other budgets.
Intervals are bootstraps over examples, with rows kept together. Seeds are too few for that: of
them the report gives the lowest and the highest.

MEASURED: to be filled
"""
import argparse
import collections
import importlib
import itertools
import json
import os
import queue
import re
import re
import subprocess
import sys
import textwrap
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm import tqdm

STATIC = "relu_sparsity"        # trains the static twin; has no budget of its own
METHODS = (STATIC, "early_exit", "gumbel_gates", "moe", "token_boost")
BUDGETS = (0.6, 0.7, 0.85)      # mean MACs, as shares of the dense ones, at which all are compared
WORDS = ((0.7, "largely agree"), (0.4, "partly agree"), (0.15, "hardly agree"),
         (-0.15, "do not agree"), (-np.inf, "contradict each other"))    # rho from here upwards
HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """What the person at the keyboard can mend: shown as one line, exit status 2."""


# Shapes below: N examples, L logs (columns), A rankings (methods and references, of several logs
# each), T tokens, S thresholds of a sweep. A matrix (L, L) or (A, A) may have axes before it.


# --- Logs -----------------------------------------------------------------------------------------

class Log(NamedTuple):
    path: Path
    meta: dict
    macs: np.ndarray        # (N,) at the calibrated threshold
    matched: np.ndarray     # (3, N) at mean MACs of BUDGETS; NaN where the sweep does not reach it
    average: np.ndarray     # (N,) over the sweep
    curve: np.ndarray       # (2, S) share of the dense MACs, accuracy (text: loss)
    quality: float          # accuracy (text: loss) as logged
    label: object           # (N,) or (N, T), or None
    right: object           # (N,) or (N, T) bool, or None
    loss: object            # (N,) or (N, T), or None
    tokens: object          # (N, T) MACs of single tokens, or None
    difficulty: object      # (N,) where it is known, or None

    @property
    def spent(self):
        """Mean MACs as a share of the dense ones."""
        return self.macs.mean() / self.meta["dense_macs"]


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


def load(path):
    """Read and check one log, as a script wrote it or as `save_slim` did. Raises UserError."""
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
    if not isinstance(meta, dict) or meta.get("schema") != 1:
        refuse("unknown schema (1 is expected)")
    missing = [key for key in ("method", "dataset", "size", "seed", "test_sha256", "dense_macs")
               if key not in meta]
    slim = meta.get("slim")
    needed = ("macs", "matched_macs", "average_macs", "curve") if slim else (
        "example", "label", "prediction", "loss", "macs", "sweep_threshold", "sweep_macs",
        "sweep_loss", "sweep_correct")
    missing += [key for key in needed if key not in arrays]
    if missing:
        refuse(f"misses {', '.join(missing)}")

    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number):
            refuse(f"{key} is not numeric")
        if not np.isfinite(array).all():
            refuse(f"{key} holds NaN or infinity")
    text = meta["dataset"] in ("shakespeare", "pydoc")
    loss, N = arrays.get("loss"), arrays["macs"].shape[:1]
    each = loss.shape if text and not slim and loss.ndim == 2 else N
    S = arrays["curve"].shape[1:] if slim else arrays["sweep_threshold"].shape
    shapes = dict(example=N, label=each, prediction=each, loss=each, macs=N, sweep_macs=S + N,
                  sweep_loss=S + N, sweep_correct=S + N, difficulty=N, average_macs=N,
                  matched_macs=(len(BUDGETS), *N), curve=(2, *S))
    if text and not slim:
        shapes["token_macs"] = each
    for key, shape in shapes.items():
        if key in arrays and arrays[key].shape != shape:
            refuse(f"{key} has shape {arrays[key].shape}, {shape} is expected")
    if not N or N[0] < 10 or not S or not S[0]:
        refuse("holds fewer than 10 examples, or no sweep")

    right = arrays["prediction"] == arrays["label"] if "prediction" in arrays else None
    if slim:
        if slim["budgets"] != list(BUDGETS):
            refuse(f"is a slim log for budgets {slim['budgets']}, not {list(BUDGETS)}")
        matched, average, curve = (arrays[k] for k in ("matched_macs", "average_macs", "curve"))
        matched, quality = np.where(matched < 0, np.nan, matched), slim["quality"]
    else:
        if not np.array_equal(arrays["example"], np.arange(N[0])):
            refuse("its examples are not in the order of the test split")
        sweep = arrays["sweep_macs"].astype(float)
        matched = np.stack([at_budget(sweep, b * meta["dense_macs"]) for b in BUDGETS])
        average = sweep.mean(0)
        curve = np.stack([sweep.mean(1) / meta["dense_macs"],
                          arrays["sweep_loss" if text else "sweep_correct"].mean(1)])
        quality = float(loss.mean() if text else right.mean())
    return Log(Path(path), meta, arrays["macs"].astype(float), matched, average, curve, quality,
               arrays.get("label"), right, loss, arrays.get("token_macs") if text else None,
               arrays.get("difficulty"))


def save_slim(log, folder):
    """Write what this report needs of a log, some 20 to 80 kB instead of up to 1.5 MB, to
    <folder>/<dataset>-<size>/<method>-s<seed>.npz, which `load` reads as well. Left out are the
    sweep, beyond its means, its average and the three matched budgets (both rounded to 1/255 of
    their range); all losses but those of the static network; and on text all that is per token."""
    text = log.meta["dataset"] in ("shakespeare", "pydoc")

    def rounded(values):
        step = np.ptp(values) / 255
        if len(np.unique(values)) > 256:
            values = values.min() + np.round((values - values.min()) / step) * step
        return np.where(np.isnan(values), -1, np.round(values)).astype(np.int32)

    meta = dict(log.meta, slim=dict(budgets=BUDGETS, quality=log.quality))
    arrays = dict(macs=log.macs.astype(np.int32), average_macs=rounded(log.average),
                  matched_macs=np.stack([rounded(row) for row in log.matched]), curve=log.curve)
    if not text:
        wrong = np.where(log.right, log.label, 255)     # which wrong answer it was plays no part
        arrays.update(label=log.label.astype(np.uint8), prediction=wrong.astype(np.uint8))
    if log.meta["method"] == STATIC:
        arrays["loss"] = per_example(log.loss).astype(np.float16)
    if log.difficulty is not None:
        arrays["difficulty"] = log.difficulty
    path = Path(folder, group(log), f"{log.meta['method']}-s{log.meta['seed']}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        for name, array in dict(arrays, meta=np.array(json.dumps(meta))).items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    return path


def is_text(logs):
    return logs[0].meta["dataset"] in ("shakespeare", "pydoc")


def by_method(logs):
    """{method: its logs}"""
    grouped = {}
    for log in logs:
        grouped.setdefault(log.meta["method"], []).append(log)
    return grouped


def group(log):
    """<dataset>-<size>, the name of the folder."""
    return f"{log.meta['dataset']}-{log.meta['size']}"


def per_example(values):
    return values.reshape(len(values), -1).mean(1)


def find(paths):
    """Files and folders -> paths of logs."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path}: no logs (*.npz) in this folder")
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found += inside
    return list(dict.fromkeys(found))


def gather(paths):
    """Load logs, refuse what cannot be compared -> list in order of method and seed."""
    logs = [load(path) for path in paths]
    first, seen = logs[0], {}
    for log in logs:
        for key, name in (("dataset", "data sets"), ("size", "sizes"),
                          ("test_sha256", "test splits")):
            if log.meta[key] != first.meta[key]:
                raise UserError(f"{log.path}: other {name} than in {first.path} ({key} "
                                f"{str(log.meta[key])[:12]}, not {str(first.meta[key])[:12]})")
        if len(log.macs) != len(first.macs):
            raise UserError(f"{log.path}: {len(log.macs)} examples, {len(first.macs)} in "
                            f"{first.path}")
        if log.label is not None and first.label is not None and not np.array_equal(
                log.label, first.label):
            raise UserError(f"{log.path}: its labels are not those of {first.path}, so its "
                            "examples are in another order")
        if log.difficulty is not None and first.difficulty is not None and not np.array_equal(
                log.difficulty, first.difficulty):
            raise UserError(f"{log.path}: its difficulties are not those of {first.path}, so its "
                            "examples are in another order")
        run = log.meta["method"], log.meta["seed"]
        if run in seen:
            raise UserError(f"{log.path}: the same method and seed as {seen[run]}")
        seen[run] = log.path
    if len({method for method, _ in seen}) < 2:
        raise UserError(f"{first.path}: logs of one method only; at least two are needed")
    place = {method: i for i, method in enumerate(METHODS)}
    return sorted(logs, key=lambda log: (place.get(log.meta["method"], 9), log.meta["method"],
                                         log.meta["seed"]))


# --- Statistics -----------------------------------------------------------------------------------

def midranks(x, weights=None):
    """x (N,) -> ranks from 1 to N, equal values sharing the mean of theirs. With integer `weights`:
    the ranks in a sample that holds each example so many times."""
    code = np.unique(x, return_inverse=True)[1]
    count = np.bincount(code, weights)
    return ((2 * np.cumsum(count) - count + 1) / 2)[code]


def correlate(columns, weights=None):
    """columns (N, L) -> Pearson correlations (L, L); NaN for a column that is constant."""
    weights = np.ones(len(columns)) if weights is None else weights
    centred = columns - weights @ columns / weights.sum()
    square = weights @ centred ** 2
    size = weights @ columns ** 2
    unit = centred / np.sqrt(np.where(square > 1e-18 * size, square, np.nan))
    return (weights[:, None] * unit).T @ unit


def ranked(columns):
    """Midranks of each of the columns (N, L); NaN where a column is NaN."""
    return np.stack([np.where(np.isnan(x), np.nan, midranks(x)) for x in columns.T], 1)


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
    return nan_mean(np.stack(each)) if each else np.full((columns.shape[1],) * 2, np.nan)


def nan_mean(stack):
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    return np.nansum(stack, 0) / np.isfinite(stack).sum(0)


def partial(columns, classes, covariates=()):
    """Correlations (L, L) of the residuals that least squares leaves of midranks, given class
    indicators (a list of (N,)) and the midranks of `covariates` (a list of (N,))."""
    design = [np.ones((len(columns), 1))]
    design += [label[:, None] == np.unique(label) for label in classes]
    design += [midranks(x)[:, None] / len(x) - 0.5 for x in covariates]
    design, ranks = np.concatenate(design, 1).astype(float), ranked(columns)
    fit = np.linalg.pinv(design.T @ design, rcond=1e-12, hermitian=True) @ (design.T @ ranks)
    residual = ranks - design @ fit
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
    full: np.ndarray            # disattenuated


def agreement(rho, member, seed, known=()):
    """rho (..., L, L) between logs -> Agreement between the rankings that they are runs of.

    member (L,): which ranking a log is a run of. seed (L,): two runs are compared only if theirs
    differ. known: {ranking: reliability} of those whose seeds do not tell it. NaN stands for what
    cannot be told: no pair of different seeds, or one of the logs is constant."""
    A = max(member) + 1
    member, seed = np.asarray(member), np.asarray(seed)
    parts = np.full((4, *rho.shape[:-2], A, A), np.nan)
    for a, b in itertools.product(range(A), repeat=2):
        apart = ((member == a)[:, None] & (member == b)) & (seed[:, None] != seed)
        if apart.any():
            values = rho[..., apart]
            parts[:3, ..., a, b] = values.mean(-1), values.min(-1), values.max(-1)
    raw = parts[0]
    for a, reliability in dict(known).items():
        raw[..., a, a] = reliability
    own = np.diagonal(raw, axis1=-2, axis2=-1)
    scale = np.sqrt(np.where(own > 0, own, np.nan))
    parts[3] = raw / (scale[..., :, None] * scale[..., None, :])
    return Agreement(*parts)


def bootstrap(columns, resamples=1000, block=1, seed=0):
    """Yield rho (L, L) of samples of the rows of columns (N, L), drawn with replacement in blocks
    of neighbours. The values are sorted once; a sample only says how often each occurs."""
    rng, blocks = np.random.default_rng(seed), len(columns) // block
    codes = [np.unique(x, return_inverse=True)[1] for x in columns.T]
    ranks = np.empty(columns.shape)
    for _ in range(resamples):
        weights = np.bincount(rng.integers(blocks, size=blocks), minlength=blocks)
        weights = np.repeat(weights, block).astype(float)
        for j, code in enumerate(codes):
            count = np.bincount(code, weights)
            ranks[:, j] = ((2 * np.cumsum(count) - count + 1) / 2)[code]
        yield correlate(ranks, weights)


def entropy(counts):
    """counts (N, K) of how people labelled each example -> nats (N,)."""
    p = counts / counts.sum(1, keepdims=True)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(1)


def split_half(counts, repeats=10, seed=0):
    """Reliability of the entropy of counts (N, K): rho between two halves of the people, stepped up
    to all of them (Spearman-Brown, 2 r / (1 + r))."""
    rng, halves = np.random.default_rng(seed), []
    for _ in range(repeats):
        half, left = np.zeros_like(counts), counts.sum(1) // 2
        rest = counts.sum(1)
        for k in range(counts.shape[1]):        # draw without replacement, label by label
            rest = rest - counts[:, k]
            half[:, k] = rng.hypergeometric(counts[:, k], rest, left)
            left = left - half[:, k]
        halves.append(spearman(entropy(half), entropy(counts - half)))
    r = np.mean(halves)
    return 2 * r / (1 + r)


# --- The study ------------------------------------------------------------------------------------

class Rankings(NamedTuple):
    names: list             # of A rankings, the methods first
    methods: int            # how many of them are methods
    member: list            # (L,) ranking of each column
    seed: list              # (L,)
    known: dict             # {ranking: reliability} where it is known otherwise
    same_seed: bool         # no two methods have different seeds: they are compared all the same
    columns: np.ndarray     # (N, L)

    def agreement(self, rho):
        return agreement(rho, self.member, self.seed, self.known)

    def only_methods(self):
        """Without the references."""
        L = sum(m < self.methods for m in self.member)
        return self._replace(names=self.names[:self.methods], member=self.member[:L],
                             seed=self.seed[:L], known={}, columns=self.columns[:, :L])

    def excuses(self):
        """Why a ranking has no numbers: "constant", "not reached", or "" for one that has."""
        words = [""] * len(self.names)
        for column, member in zip(self.columns.T, self.member):
            if np.isnan(column).any():
                words[member] = "not reached"
            elif np.ptp(column) == 0:
                words[member] = "constant"
        return words


def rankings(logs, compute, references=()):
    """compute: log -> (N,). references: (name, seeds, list of (N,), known reliability or None)."""
    names = list(dict.fromkeys(log.meta["method"] for log in logs))
    methods, known = len(names), {}
    member = [names.index(log.meta["method"]) for log in logs]
    seed, columns = [log.meta["seed"] for log in logs], [compute(log) for log in logs]
    same_seed = len(set(seed)) == 1
    for name, seeds, values, reliability in references:
        if reliability is not None:
            known[len(names)] = reliability
        member += [len(names)] * len(values)
        names, seed, columns = names + [name], seed + list(seeds), columns + list(values)
    seed = list(range(len(seed))) if same_seed else seed
    return Rankings(names, methods, member, seed, known, same_seed,
                    np.stack(columns, 1).astype(float))


def study(table, classes, covariates, right, resamples=1000, block=1):
    """Everything about one set of Rankings -> dict of Agreement; `interval` holds those of the
    bootstrap, `ceiling` (A, A) the rho farthest from 0, on its side, that ties allow.

    classes: list of (N,), held fixed by the partial correlation; the first also for the mean within
    classes. covariates: list of (N,), held fixed as well. right: (N, methods' L) bool, or None."""
    rho, methods = correlate(ranked(table.columns)), table.only_methods()
    sampled = tqdm(bootstrap(table.columns, resamples, block), "bootstrap", resamples, leave=False)
    found = dict(all=table.agreement(rho), interval=table.agreement(np.stack(list(sampled))),
                 overlap=table.agreement(top_overlap(table.columns, len(table.columns) // 10)))
    highest, lowest = table.agreement(tie_ceilings(table.columns)).raw
    found["ceiling"] = np.where(found["all"].raw < 0, lowest, highest)
    if classes:
        found["within class"] = methods.agreement(within_class(methods.columns, classes[0]))
    if classes or covariates:
        found["partial"] = methods.agreement(partial(methods.columns, classes, covariates))
    if right is not None:
        for name, keep in ("both right", right), ("both wrong", ~right):
            found[name] = methods.agreement(pairs_on(methods.columns, keep, methods.seed))
    for name, label in ("shuffled", None), ("class alone", classes[0] if classes else None):
        if name == "shuffled" or label is not None:
            columns = shuffle(methods.columns, label)
            found[name] = methods.agreement(correlate(ranked(columns)))
    return found


def shuffle(columns, label=None, seed=0):
    """Each of the columns (N, L) in a random order of its own, inside the classes of label (N,) if
    there is one: what is left is what chance, or the class, brings about."""
    rng, columns = np.random.default_rng(seed), columns.copy()
    for name in np.unique(label) if label is not None else [None]:
        rows = np.flatnonzero(label == name) if label is not None else np.arange(len(columns))
        columns[rows] = rng.permuted(columns[rows], axis=0)
    return columns


def typical(matrix, which):
    """Median, lowest and highest over the pairs of rankings `which` of matrix (..., A, A), without
    the pairs that have no number."""
    pairs = np.stack([matrix[..., a, b] for a, b in itertools.combinations(which, 2)])
    pairs = pairs[np.isfinite(pairs.reshape(len(pairs), -1)).any(1)]
    if not len(pairs):
        return [np.full(matrix.shape[:-2], np.nan)] * 3
    return [f(pairs, 0) for f in (np.nanmedian, np.nanmin, np.nanmax)]


def told(agree, which):
    """The strongest agreement that the number of seeds allows -> its name and matrix (A, A)."""
    full = np.isfinite(typical(agree.full, which)[0])
    return ("disattenuated", agree.full) if full else ("raw", agree.raw)


def deciders(names):
    """Indices of the methods that choose their compute, or of all if those are fewer than two."""
    some = [i for i, name in enumerate(names) if name != STATIC]
    return some if len(some) > 1 else list(range(len(names)))


def word(rho):
    return "cannot be compared yet" if np.isnan(rho) else next(w for t, w in WORDS if rho >= t)


# --- Report ---------------------------------------------------------------------------------------

def number(x, digits=2):
    return "unknown" if np.isnan(x) else f"{round(float(x), digits) + 0.0:.{digits}f}"   # no -0.00


def spread(values, digits=2):
    """Mean (lowest to highest)."""
    values = np.asarray(values, float)
    text = number(values.mean(), digits)
    if len(values) > 1 and not np.isnan(values).any():
        text += f" ({values.min():.{digits}f} to {values.max():.{digits}f})"
    return text


def markdown(header, rows):
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows), ""]


def listed(names):
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def pair_tables(table, found):
    """Two tables, raw and disattenuated: a row per pair of methods."""
    extra = [k for k in ("within class", "partial", "both right", "both wrong") if k in found]
    why, a, raw, full = table.excuses(), found["all"], [], []
    low, high = np.nanpercentile(found["interval"].full, [2.5, 97.5], axis=0)
    for i, j in itertools.combinations(range(table.methods), 2):
        pair, excuse = f"{table.names[i]}, {table.names[j]}", why[i] or why[j]
        if excuse:
            raw.append([pair, excuse] + [""] * (3 + len(extra)))
            full.append([pair, excuse] + [""] * len(extra))
            continue
        top = found["ceiling"][i, j]
        raw.append([pair, f"{number(a.raw[i, j])} ({a.low[i, j]:.2f} to {a.high[i, j]:.2f})",
                    number(top), number(a.raw[i, j] / top),
                    *(number(found[k].raw[i, j]) for k in extra),
                    number(found["overlap"].raw[i, j])])
        full.append([pair, f"{number(a.full[i, j])} [{low[i, j]:.2f} to {high[i, j]:.2f}]",
                     *(number(found[k].full[i, j]) for k in extra)])
    of = "the same seed: more alike than others" if table.same_seed else "different seeds"
    return [f"Raw rho, mean (lowest to highest) over pairs of runs of {of}:", "",
            *markdown(["pair", "rho", "tie ceiling", "share of it", *extra, "hardest 10 %"], raw),
            "Disattenuated, each column by reliabilities of its own kind [95 % over examples]:", "",
            *markdown(["pair", "all", *extra], full)]


def view_table(views):
    """The agreement of every pair at every budget."""
    names, rows = next(iter(views.values()))[0].names, []
    for i, j in itertools.combinations(range(len(names)), 2):
        excuses = [table.excuses() for table, _ in views.values()]
        rows.append([f"{names[i]}, {names[j]}"] + [
            why[i] or why[j] or number(told(agree, range(len(names)))[1][i, j])
            for why, (_, agree) in zip(excuses, views.values())])
    return markdown(["pair", *views], rows)


def reference_table(table, agree):
    """Every method against every outside reference: raw, and disattenuated."""
    why, methods, rows = table.excuses(), range(table.methods), []
    for r in range(table.methods, len(table.names)):
        rows.append([table.names[r], number(agree.raw[r, r])] + [
            why[m] or f"{number(agree.raw[m, r])} / {number(agree.full[m, r])}" for m in methods])
    return markdown(["reference", "its reliability", *table.names[:table.methods]], rows)


def method_table(logs, table, found):
    rows, a = [], found["all"]
    better = "loss" if is_text(logs) else "accuracy"
    low, high = np.nanpercentile(found["interval"].raw, [2.5, 97.5], axis=0)
    for i, (name, runs) in enumerate(by_method(logs).items()):
        reliability = table.excuses()[i] or number(a.raw[i, i])
        if np.isfinite(a.raw[i, i]):
            reliability += (f" ({a.low[i, i]:.2f} to {a.high[i, i]:.2f}) "
                            f"[{low[i, i]:.2f} to {high[i, i]:.2f}]")
        rows.append([name, ", ".join(str(log.meta["seed"]) for log in runs),
                     ", ".join(sorted({str(log.meta.get("budget_wanted")) for log in runs})),
                     spread([log.spent for log in runs], 3),
                     spread([log.quality for log in runs], 4),
                     spread([log.curve[1, -1] for log in runs], 4),
                     f"{np.median([len(np.unique(log.macs)) for log in runs]):,.0f}", reliability])
    return markdown(["method", "seeds", "budget wanted", "MACs, share of dense", better,
                     f"{better}, full model", "distinct costs",
                     "reliability (over seeds) [95 % over examples]"], rows)


def neurons(logs, table, found):
    """Do hard examples activate more neurons or fewer? From the logs of STATIC."""
    own = [log for log in logs if log.meta["method"] == STATIC and log.loss is not None]
    if not own:
        return "Whether hard examples activate more neurons is unknown: no log of a static network."
    rho, i = [spearman(log.macs, per_example(log.loss)) for log in own], table.names.index(STATIC)
    mean = np.mean(rho)
    answer = ("unknown, it is constant" if np.isnan(mean) else "more" if mean > 0.05 else
              "fewer" if mean < -0.05 else "neither")
    others = [f"{table.names[r]} {found['all'].raw[i, r]:.2f}" for r in range(len(table.names))
              if r != i and np.isfinite(found["all"].raw[i, r])]
    return (f"Do hard examples activate more neurons of the static ReLU network, or fewer? "
            f"{answer.capitalize()}: raw rho of its compute with its own loss is {spread(rho)}; "
            f"with {', '.join(others)}.")


def first_screen(logs, table, found, views, unit):
    """The answer, before any table."""
    names, which = table.names[:table.methods], range(table.methods)
    kind, matrix = told(found["all"], which)
    middle, low, high = typical(matrix, which)
    answer = (f"On {len(logs[0].macs):,} {unit}, {listed(names)} {word(middle)} on which ones "
              f"deserve the most compute: the median {kind} rho of their rankings is "
              f"{number(middle)} (pairs: {number(low)} to {number(high)}).")
    some = deciders(names)
    if len(some) < len(names):
        inner = typical(matrix, some)
        answer += (f" Without the static network, which decides nothing, the others "
                   f"{word(inner[0])}") + ("." if np.isnan(inner[0]) else f": {number(inner[0])} "
                                           f"({number(inner[1])} to {number(inner[2])}).")
    lines = [f"# Do they agree on what is hard? {group(logs[0])}", "", f"**{answer}**", ""]
    if kind == "disattenuated":
        sampled = typical(found["interval"].full, which)[0]
        low, high = np.nanpercentile(sampled, [2.5, 97.5])
        lines.append(f"* 95 % interval of the median, over {unit}: {low:.2f} to {high:.2f}.")
    else:
        lines.append("* Reliability is unknown: it takes two seeds of each method. So the rho is "
                     "raw" + (", and of runs of the same seed, which are more alike than others."
                              if table.same_seed else "."))

    def median(key, matrix="full" if kind == "disattenuated" else "raw"):
        return number(typical(getattr(found[key], matrix), which)[0])

    share = typical(found["all"].raw / found["ceiling"], which)[0]
    lines.append(f"* Raw rho: median {median('all', 'raw')}, a share of {number(share)} of what "
                 f"ties allow. Overlap of the hardest 10 %: {median('overlap', 'raw')} (by chance "
                 f"0.10).")
    pairs = [(matrix[a, b], f"{names[a]} and {names[b]}")
             for a, b in itertools.combinations(which, 2) if np.isfinite(matrix[a, b])]
    if pairs:
        lines.append(f"* Most alike: {max(pairs)[1]} ({max(pairs)[0]:.2f}). Least alike: "
                     f"{min(pairs)[1]} ({min(pairs)[0]:.2f}).")
    same = [f"{text} {median(key)}" for key, text in (
        ("within class", "within classes"), ("both right", "where both answer right"),
        ("both wrong", "where both answer wrong"), ("partial", "covariates held fixed"))
        if key in found]
    lines += [f"* The same median {', '.join(same)}."] if same else []
    lines.append("* " + neurons(logs, table, found))
    if "people" in table.names:
        r = table.names.index("people")
        raw, full = (number(np.nanmedian(m[:table.methods, r])) for m in
                     (found["all"].raw, found["all"].full))
        lines.append(f"* With people: median rho {raw}, disattenuated {full}. Errors of published "
                     "networks with people: 0.34 and 0.43.")
    answers, texts = set(), []
    for name, (view, agree) in views.items():
        middle = typical(told(agree, some)[1], some)[0]
        answers |= {word(middle)} if np.isfinite(middle) else set()
        gone = [names[i] for i in some if view.excuses()[i]]
        texts.append(f"{name} {number(middle)}" + (f" (without {listed(gone)})" if gone else ""))
    lines.append(f"* At other budgets the answer for {listed(names[i] for i in some)} "
                 f"{('is unknown', 'stays', 'changes')[min(len(answers), 2)]}; medians: "
                 f"{', '.join(texts)}.")
    spent = [f"{name} {spread([r.spent for r in runs], 3)} for "
             f"{spread([r.quality for r in runs], 3)}" for name, runs in by_method(logs).items()]
    lines.append(f"* Mean MACs, as shares of the dense ones, for which "
                 f"{'loss' if is_text(logs) else 'accuracy'}: {'; '.join(spent)}.")
    seeds = sorted({len(runs) for runs in by_method(logs).values()})
    return lines + [f"* Seeds per method: {listed(map(str, seeds))}. n = {len(logs[0].macs):,} "
                    f"{unit}.", ""]


HOW_TO_READ = f"""
## How to read this

Words, by rho: {'; '.join(f'from {t:.2f} {w}' for t, w in WORDS[:-1])}; below that {WORDS[-1][1]}.
For scale: errors of two families of CNN agree at 0.80 to 0.88 (disattenuated), a CNN and random
features at 0.55, people and machines at 0.43.

*Raw*: Spearman's rho with midranks, mean over pairs of runs of different seeds. *Tie ceiling*: the
largest rho that equal costs allow. *Reliability*: rho between seeds of one method.
*Disattenuated*: raw, divided by the root of the product of both reliabilities; 1 means that the
methods differ no more than their own seeds do, and noise can carry it beyond. *Within class*: mean
of the rhos inside each class. *Partial*: correlation of what is left of the ranks when class,
the static network's loss and brightness (images) or the character read, its position and the
static network's loss (text, per token) are regressed out; *explained* is what that takes away.
*Hardest 10 %*: share in common of the costliest tenth; ties share their places; chance is 0.10.
*At {', '.join(f'{b:.2f}' for b in BUDGETS)}*: costs interpolated between neighbouring thresholds
of the sweep so that their mean is that share of the dense MACs; *not reached*: no threshold of the
sweep spends so much, or so little. *Sweep average*: mean cost over all thresholds. *Constant*:
every example costs the same, so there is no ranking. *Unknown*: too few seeds, or reliability not
above 0.
""".strip().splitlines()


# --- Pictures -------------------------------------------------------------------------------------

def colour(names):
    """A colour per method, the same in every picture and whichever methods are there."""
    order = [*METHODS, *(n for n in names if n not in METHODS)]
    return {name: f"C{order.index(name) % 10}" for name in names}


def draw_agreement(path, table, found, title):
    """Disattenuated above the diagonal, raw and its tie ceiling below, reliability on it."""
    A, a, why = len(table.names), found["all"], table.excuses()
    shown, texts = np.full((A, A), np.nan), {}
    for i, j in itertools.product(range(A), repeat=2):
        shown[i, j] = rho = (a.full if j > i else a.raw)[i, j]
        texts[i, j] = why[i] or why[j] or number(rho)
        if j < i and np.isfinite(rho):
            texts[i, j] += f"\nof {number(found['ceiling'][i, j])}"
    figure = Figure(figsize=(3.5 + 1.15 * A, 2.4 + 0.95 * A), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, alpha=0.75)
    for (i, j), text in texts.items():
        axis.text(j, i, text, ha="center", va="center", fontsize=9,
                  weight="bold" if i == j else "normal")
    if table.methods < A:
        axis.axhline(table.methods - 0.5, color="black")
        axis.axvline(table.methods - 0.5, color="black")
    axis.set_xticks(range(A), table.names, rotation=30, ha="right")
    axis.set_yticks(range(A), table.names)
    axis.set_title(f"{title}: agreement of the rankings by compute\n"
                   "above the diagonal: disattenuated; on it: reliability between seeds;\n"
                   "below: raw rho, of what ties allow", fontsize=10)
    figure.colorbar(image, label="Spearman's rho", shrink=0.8)
    figure.savefig(path, dpi=120)


def draw_quality(path, logs, title):
    """Accuracy or loss against MACs at every point of the sweep, mean and spread over seeds."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis, colours = figure.subplots(), colour(by_method(logs))
    for name, runs in by_method(logs).items():
        for log in runs:
            axis.plot(*log.curve[:, np.argsort(log.curve[0])], color=colours[name], lw=0.6,
                      alpha=0.5)
        axis.plot([], [], "o-", ms=4, color=colours[name], label=name)
        if len({log.curve.shape for log in runs}) == 1:             # the same number of thresholds
            curves = np.stack([log.curve for log in runs])          # (seeds, 2, S)
            mean = curves.mean(0)
            around = np.maximum([mean - curves.min(0), curves.max(0) - mean], 0)
            axis.errorbar(*mean, around[:, 1], around[:, 0], fmt="o-", ms=4, lw=1.5, capsize=2,
                          color=colours[name])
        axis.plot(np.mean([log.spent for log in runs]),
                  np.mean([log.quality for log in runs]), "D", ms=8, mfc="none",
                  color=colours[name])
    static = [log.curve[1, -1] for log in logs if log.meta["method"] == STATIC]
    if static:
        axis.plot(1, np.mean(static), "*", color="black", ms=14, label="static twin, dense")
        axis.axhline(np.mean(static), color="black", lw=0.5, ls=":")
    # A few thresholds destroy the model; showing them all would flatten the rest.
    values = [value for log in logs for value in log.curve[1]]
    if is_text(logs):
        low, high = np.percentile(values, [10, 60])
        axis.set_ylim(min(values) - 0.05, min(max(values), high + 4 * (high - low)) + 0.05)
    else:
        low, high = np.percentile(values, [40, 90])
        axis.set_ylim(max(min(values), low - 4 * (high - low)) - 0.02, max(values) + 0.02)
    axis.plot([], [], "D", mfc="none", color="grey", label="as logged")
    axis.set(title=f"{title}: what compute buys (points: thresholds; bars: lowest to highest seed)",
             xlabel="mean MACs per example, share of the dense twin's",
             ylabel="loss, nats per character (lower is better)" if is_text(logs)
             else "test accuracy")
    axis.legend()
    figure.savefig(path, dpi=120)


def draw_deciles(path, logs, panels, title):
    """Mean compute by decile of a hardness. panels: (name, hardness (M,), list of costs (M,) as
    shares of the dense MACs, list of bool (M,) of the examples that count), one panel each."""
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = colour(by_method(logs))
    for axis, (name, hardness, costs, keep) in zip(axes, panels):
        deciles, means = np.array_split(np.argsort(hardness, kind="stable"), 10), {}
        for log, cost, use in zip(logs, costs, keep):
            row = [cost[d][use[d]].mean() if use[d].sum() >= 10 else np.nan for d in deciles]
            means.setdefault(log.meta["method"], []).append(row)
        for method, rows in means.items():
            rows = np.array(rows)
            axis.plot(range(1, 11), rows.mean(0), "o-", ms=4, color=colours[method], label=method)
            axis.fill_between(range(1, 11), rows.min(0), rows.max(0), color=colours[method],
                              alpha=0.2, lw=0)
        axis.set(title=name, xlabel="decile, easy to hard", xticks=range(1, 11),
                 xlim=(0.5, 10.5))
    axes[0].set_ylabel("mean MACs, share of the dense twin's")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}: what easy and hard examples cost (bands: lowest to highest seed)")
    figure.savefig(path, dpi=120)


def percentiles(table):
    """Rankings without references -> (N, methods): percentile of each cost, mean over seeds."""
    ranks, member = 100 * (ranked(table.columns) - 0.5) / len(table.columns), np.array(table.member)
    return np.stack([ranks[:, member == m].mean(1) for m in range(table.methods)], 1)


def extremes(share, names):
    """share (N, methods) percentiles -> {heading: order of the examples}: those that all methods
    that choose their compute find cheap, find costly, and disagree on the most."""
    some = deciders(names)
    share, who = share[:, some], f"{listed(names[i] for i in some)}"
    return {f"cheap for {who}": np.argsort(share.max(1), kind="stable"),
            f"costly for {who}": np.argsort(-share.min(1), kind="stable"),
            f"most disputed by {who}": np.argsort(-share.std(1), kind="stable")}


def draw_strips(path, images, labels, share, names, title, count=10):
    """Three strips of images (N, 3, 32, 32), each with a bar per method: its percentile."""
    figure = Figure(figsize=(1.35 * count, 9), layout="constrained")
    parts, colours = figure.subfigures(4, 1, height_ratios=(4, 4, 4, 0.6)), colour(names)
    for part, (name, order) in zip(parts, extremes(share, names).items()):
        axes = part.subplots(2, count, height_ratios=(1, 0.55))
        part.suptitle(f"{title}: {name}" if part is parts[0] else name, fontsize=11)
        for top, bottom, i in zip(*axes, order[:count]):
            top.imshow(images[i].transpose(1, 2, 0))
            top.set_title(labels[i], fontsize=9)
            top.axis("off")
            bottom.bar(range(len(names)), share[i], color=[colours[n] for n in names])
            bottom.set(ylim=(0, 100), xticks=[], yticks=[0, 50, 100])
            bottom.tick_params(labelleft=bottom is axes[1, 0], labelsize=7)
        axes[1, 0].set_ylabel("percentile\nof cost", fontsize=8)
    parts[3].legend(handles=[Patch(color=colours[n], label=n) for n in names], loc="center",
                    ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


def draw_one_class(path, logs, images, name, members, title, count=5):
    """Images (N, 3, 32, 32) of one class, members (n,): a row per method, on the left those that
    cost it least, on the right those that cost it most, with their MACs."""
    methods = by_method(logs)
    figure = Figure(figsize=(1.2 * 2 * count + 1, 1.45 * len(methods) + 0.6), layout="constrained")
    axes = figure.subplots(len(methods), 2 * count + 1, squeeze=False,
                           width_ratios=[1] * count + [0.3] + [1] * count)
    for row, (method, runs) in zip(axes, methods.items()):
        cost = np.mean([log.macs / log.meta["dense_macs"] for log in runs], 0)[members]
        order = np.argsort(cost, kind="stable")
        for axis in row:
            axis.axis("off")
        for axis, i in zip([*row[:count], *row[count + 1:]], [*order[:count], *order[-count:]]):
            axis.imshow(images[members[i]].transpose(1, 2, 0))
            axis.set_title(f"{cost[i]:.2f}", fontsize=9)
        row[0].text(-0.15, 0.5, method, transform=row[0].transAxes, rotation=90, fontsize=9,
                    ha="center", va="center")
    figure.suptitle(f"{title}: the {name} images that cost each method least, and most "
                    "(MACs, share of the dense ones)", fontsize=11)
    figure.savefig(path, dpi=110)


def draw_passages(path, characters, share, token_share, names, title):
    """Three windows of text, the characters (N, T) coloured by the percentile of what each method
    spends on them: a line per method."""
    figure = Figure(figsize=(14, 2 + 0.33 * 3 * len(names)), layout="constrained")
    axes = figure.subplots(3, 1)
    for axis, (name, order) in zip(axes, extremes(share, names).items()):
        i, T = order[0], min(64, characters.shape[1])
        image = axis.imshow(token_share[i, :T].T, cmap="viridis", vmin=0, vmax=100, alpha=0.6,
                            aspect="auto")
        for (t, m) in itertools.product(range(T), range(len(names))):
            sign = chr(characters[i, t]).replace("\n", "\\n").replace("$", r"\$")
            axis.text(t, m, sign, ha="center", va="center", family="monospace", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks([])
        axis.set_title(f"window {i}: {name}", fontsize=10)
    figure.suptitle(f"{title}: on which characters each method spends its compute")
    figure.colorbar(image, ax=axes, label="percentile of cost")
    figure.savefig(path, dpi=120)


def draw_time(path, logs, title):
    """MACs and time as shares of the dense twin's: a pair of bars per method and batch size."""
    runs = {name: [log for log in g if "wall_clock" in log.meta]
            for name, g in by_method(logs).items()}
    runs, colours = {name: g for name, g in runs.items() if g}, colour(by_method(logs))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, batch in zip(figure.subplots(1, 2, sharey=True), (1, 256)):
        for i, (name, group_) in enumerate(runs.items()):
            macs = [log.spent for log in group_]
            clocks = [log.meta["wall_clock"] for log in group_]
            time = [c[f"skipping_ms_batch_{batch}"] / c[f"dense_ms_batch_{batch}"] for c in clocks]
            for x, values, hatch in ((i - 0.2, macs, ""), (i + 0.2, time, "///")):
                mean, low, high = np.mean(values), min(values), max(values)
                axis.bar(x, mean - 1, 0.38, bottom=1, color=colours[name], hatch=hatch,
                         edgecolor="white", capsize=3,
                         yerr=np.maximum([[mean - low], [high - mean]], 0))
                axis.annotate(f"{mean:.2f}", (x, high if mean > 1 else low),
                              (0, 4 if mean > 1 else -4), textcoords="offset points", ha="center",
                              fontsize=9, va="bottom" if mean > 1 else "top")
        axis.axhline(1, color="black", lw=1)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.set(title=f"batch of {batch}")
        axis.set_xticks(range(len(runs)), runs, rotation=20, ha="right")
    low, high = axis.get_ylim()
    marks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low < t < high]
    axis.set_yticks(marks, map(str, marks))
    axis.set_yticks([], minor=True)
    figure.axes[0].set_ylabel("share of the dense twin's (log scale)\n"
                              "below 1: saved, above 1: lost")
    figure.legend(handles=[Patch(color="grey", label="MACs"), Patch(
        facecolor="grey", hatch="///", edgecolor="white", label="time")],
        loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{title}: MACs saved against time saved")
    figure.savefig(path, dpi=120)


def test_images(log, folder):
    """The test images that a log is about -> uint8 (N, 3, 32, 32) and names of the classes, or None
    and why not. Nothing is downloaded; the drawing and reading code is the static script's."""
    dataset = log.meta["dataset"]
    if dataset == "cifar10" and not any(Path(folder, name).exists() for name in (
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz")):
        return None, f"CIFAR-10 is not in {folder} (--data names another folder)"
    try:
        script = importlib.import_module(STATIC)
        data = script.load_data(script.Config(dataset=dataset, size=log.meta["size"],
                                              data=str(folder), device="cpu"))
    except Exception as e:      # torch, the script, or the data: the report does without
        return None, f"the test images could not be had ({e})"
    if data.sha256 != log.meta["test_sha256"]:
        return None, f"the {dataset} in {folder} is not what the logs are about"
    return data.test[0].numpy(), script.NAMES[dataset]


# --- Comparing ------------------------------------------------------------------------------------

def read_people(path, log):
    """Counts (N, 10) of how people labelled each test image. Raises UserError."""
    try:
        counts = np.load(path, allow_pickle=False)
        assert counts.ndim == 2 and np.issubdtype(counts.dtype, np.number)
    except Exception:
        raise UserError(f"{path}: is no array of counts (.npy)")
    if log.meta["dataset"] != "cifar10":
        raise UserError(f"{path}: --human is about cifar10, the logs about {log.meta['dataset']}")
    if counts.shape != (len(log.macs), 10):
        raise UserError(f"{path}: has shape {counts.shape}, {(len(log.macs), 10)} is expected")
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.sum(1).min() < 2:
        raise UserError(f"{path}: holds NaN, negative counts, or images that nobody labelled")
    if (counts.argmax(1) == log.label).mean() < 0.5:
        raise UserError(f"{path}: people agree with fewer than half of the labels: the images "
                        "are not in the official order")
    return counts.astype(np.int64)


def compare(logs, args):
    """Write the report and its pictures -> their paths, and the first screen."""
    first, text, N = logs[0], is_text(logs), len(logs[0].macs)
    title, names = group(first), list(by_method(logs))
    unit = f"{'windows' if text else 'test images'} of {first.meta['dataset']}"
    folder, left_out, pictures = Path(args.out, "figures", title), [], []
    folder.mkdir(parents=True, exist_ok=True)

    # Outside references, and what else is known about the examples.
    references, covariates, hardness = [], [], []
    static = [log for log in logs if log.meta["method"] == STATIC and log.loss is not None]
    difficulty = next((log.difficulty for log in logs if log.difficulty is not None), None)
    if difficulty is not None:
        references.append(("known difficulty", [-1], [difficulty], 1.0))
        hardness.append(("known difficulty", difficulty))
    if args.human:
        counts = read_people(args.human, first)
        references.append(("people", [-2], [entropy(counts)], split_half(counts)))
        hardness.append(("disagreement of people", entropy(counts)))
    if static:
        losses = [per_example(log.loss).astype(float) for log in static]
        references.append(("static loss", [log.meta["seed"] for log in static], losses, None))
        covariates.append(np.mean(losses, 0))
        hardness.append(("static loss", covariates[0]))
    else:
        left_out.append(f"what needs the static network's loss: there is no {STATIC} log")
    images, classes = (None, None) if text else test_images(first, args.data)
    if images is not None:
        covariates.append(per_example(images.astype(np.float32)))       # brightness
    elif not text:
        left_out.append(f"strips of images, and brightness: {classes}")

    # Statistics: as logged, at other budgets, per token.
    table = rankings(logs, lambda log: log.macs, references)
    found = study(table, [] if text else [first.label], covariates,
                  None if text else np.stack([log.right for log in logs], 1))
    views = {"as logged": lambda log: log.macs}
    views |= {f"at {b:.2f}": lambda log, i=i: log.matched[i] for i, b in enumerate(BUDGETS)}
    views |= {"sweep average": lambda log: log.average}
    views = {name: rankings(logs, compute) for name, compute in views.items()}
    views = {name: (view, view.agreement(correlate(ranked(view.columns))))
             for name, view in views.items()}
    share = percentiles(table.only_methods())

    def picture(name, caption, draw, *arguments):
        draw(folder / name, *arguments, title)
        pictures.append((name, caption))

    picture("agreement.png", "Agreement of the rankings", draw_agreement, table, found)
    picture("quality.png", "What compute buys", draw_quality, logs)
    costs = [log.macs / log.meta["dense_macs"] for log in logs]
    all_of_them = [np.ones(N, bool)] * len(logs)
    panels, tokens = [], None
    if not text:
        for by, hard in hardness[:1] if difficulty is not None else hardness[-1:]:
            panels = [(f"answered right, by {by}", hard, costs, [log.right for log in logs]),
                      (f"answered wrong, by {by}", hard, costs, [~log.right for log in logs])]
    panels += [(f"all {'windows' if text else 'images'}, by {by}", hard, costs, all_of_them)
               for by, hard in hardness
               if text or by == "disagreement of people"]
    if text and all(log.tokens is not None for log in logs):
        read = np.append(32, first.label)[:-1].reshape(first.label.shape)   # windows join up
        T, right = read.shape[1], [log.right.ravel() for log in logs]
        losses = [np.mean([log.loss for log in static], 0).ravel()] if static else []
        tokens = rankings(logs, lambda log: log.tokens.ravel())
        by_token = study(tokens, [read.ravel(), np.tile(np.arange(T), N)], losses,
                         np.stack(right, 1), 100, T)
        costs = [log.tokens.ravel() * T / log.meta["dense_macs"] for log in logs]
        panels += [(f"characters answered {name}, by static loss", loss, costs, keep)
                   for loss in losses for name, keep in
                   (("right", right), ("wrong", [~r for r in right]))]
        picture("passages.png", "Cheap for all, costly for all, disputed", draw_passages, read,
                share, percentiles(tokens).reshape(N, T, -1), names)
    elif text:
        left_out.append("everything per token: token_macs is not in all logs")
    if panels:
        picture("deciles.png", "Compute by difficulty", draw_deciles, logs, panels)
    if images is not None:
        kind = sorted(set(classes))[len(set(classes)) // 2]         # any class will do
        picture("one_class.png", "One class: the cheapest and the costliest images", draw_one_class,
                logs, images, kind, np.flatnonzero(np.array(classes)[first.label] == kind))
        picture("strips.png", "Cheap for all, costly for all, disputed", draw_strips, images,
                [classes[y] for y in first.label], share, names)
    if any("wall_clock" in log.meta for log in logs):
        picture("time.png", "MACs saved against time saved", draw_time, logs)
    else:
        left_out.append("MACs against time: no log has wall_clock in its meta")

    screen = first_screen(logs, table, found, views, unit)
    lines = screen + [f"![{caption}]({name})" for name, caption in pictures] + [""]
    lines += [f"Left out: {'; '.join(left_out)}.", ""] if left_out else []
    lines += ["## Methods", "", *method_table(logs, table, found), "## Pairs", "",
              *pair_tables(table, found), "## At other budgets", "",
              "Disattenuated where reliabilities are known, else raw:", "", *view_table(views)]
    if references:
        lines += ["## Outside references", "", "Raw / disattenuated rho:", "",
                  *reference_table(table, found["all"])]
    if tokens:
        lines += ["## Per token", "", f"Over {len(tokens.columns):,} characters, as logged; the "
                  "class is the character read. Intervals: 100 samples of whole windows.", "",
                  *pair_tables(tokens, by_token)]
    chance = [f"{name}: {number(typical(found[key].raw, range(len(names)))[0])}" for key, name in
              (("shuffled", "examples shuffled"), ("class alone", "shuffled inside classes"))
              if key in found]
    lines += ["## By chance", "", f"Median raw rho. {'; '.join(chance).capitalize()}.", ""]
    report = folder / "report.md"
    report.write_text("\n".join(lines + HOW_TO_READ) + "\n")
    return [report, *(folder / name for name, _ in pictures)], screen


# --- Training what is missing ---------------------------------------------------------------------

def planned(args):
    """The runs that --train asks for -> existing logs, commands {path of the log: command} of the
    missing ones, names of scripts that are not there, and the device. Raises UserError for a log
    that was trained with other options."""
    finished, missing, absent, device = [], {}, [], "cpu"
    for name in METHODS:
        if not (HERE / f"{name}.py").exists():
            absent.append(name)
            continue
        script = importlib.import_module(name)      # knows its defaults, and what it would refuse
        options = {key: getattr(args, key) for key in
                   ("dataset", "size", "data", "out", "device", "steps", "epochs")
                   if getattr(args, key) is not None}
        if args.budget is not None and name != STATIC:
            options["budget"] = args.budget
        for seed in range(args.seeds):
            try:
                cfg = script.Config(seed=seed, **options)
            except script.UserError as e:
                raise UserError(str(e))
            device = cfg.device
            path = Path(args.out, "logs", f"{cfg.dataset}-{cfg.size}", f"{name}-s{seed}.npz")
            if path.exists():
                meta, wanted = load(path).meta, asdict(cfg)
                had = meta.get("config", {})
                other = [f"{key} {had.get(key)}, not {wanted.get(key)}"
                         for key in sorted(had.keys() | wanted.keys())
                         if key not in ("data", "out", "device", "compile")
                         and had.get(key) != wanted.get(key)]
                if other:
                    raise UserError(f"{path}: was trained with {'; '.join(other)}: move it "
                                    "away, or take another --out")
                finished.append(path)
            else:
                flags = itertools.chain(*((f"--{k}", str(v)) for k, v in options.items()))
                missing[path] = [sys.executable, str(HERE / f"{name}.py"), "--seed", str(seed),
                                 *flags]
    return finished, missing, absent, device


def run(command, threads, children, lines):
    """Run a script on so many threads, its progress on one of the free `lines` -> its exit status
    and the end of what it said."""
    line, tail = lines.get(), b""
    threads = {} if "OMP_NUM_THREADS" in os.environ else dict(OMP_NUM_THREADS=str(threads))
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=os.environ | threads)
    children.append(child)
    while part := os.read(child.stdout.fileno(), 4096):
        tail = (tail + part)[-4000:]
        said = [text for text in re.split("[\r\n]", tail.decode(errors="replace")) if text.strip()]
        line.set_description_str(f"{Path(command[1]).stem}, seed {command[3]}: {said[-1]}"[:110])
    line.set_description_str("")
    lines.put(line)
    return child.wait(), said[-5:] if tail else ["it said nothing"]


def train(args):
    """Run the scripts for the logs that are missing -> paths of all logs that are there, and the
    number of failures. The first bar counts runs, the lines below it are those of the running."""
    paths, missing, absent, device = planned(args)
    for name in absent:
        print(f"{name}.py is not in {HERE}: left out", file=sys.stderr)
    cores = os.cpu_count() or 1
    jobs = max(1, min(args.jobs or (min(cores, 4) if device == "cpu" else 1), len(missing)))
    failures, children, lines = len(absent), [], queue.SimpleQueue()
    with ThreadPoolExecutor(jobs) as pool, tqdm(
            total=len(paths) + len(missing), initial=len(paths), desc="runs", unit="run") as bar:
        for position in range(jobs):
            lines.put(tqdm(bar_format="{desc}", position=1 + position, leave=False))
        running = {pool.submit(run, command, max(1, cores // jobs), children, lines): path
                   for path, command in missing.items()}
        try:
            for job in as_completed(running):
                (status, said), path = job.result(), running[job]
                if status == 0 and path.exists():
                    paths.append(path)
                else:
                    failures += 1
                    tqdm.write(f"{path.stem} failed (exit status {status}):\n"
                               + textwrap.indent("\n".join(said), "    "), sys.stderr)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    return paths, failures


# --- Command line ---------------------------------------------------------------------------------

def inventory(args):
    """What to say when nothing was asked for."""
    folders = sorted(path for path in Path(args.out, "logs").glob("*") if any(path.glob("*.npz")))
    for folder in folders:
        runs = collections.defaultdict(list)
        for path in sorted(folder.glob("*-s*.npz")):
            runs[path.stem.rsplit("-s", 1)[0]].append(path.stem.rsplit("-s", 1)[1])
        print(f"{folder}: " + "; ".join(f"{m} seeds {', '.join(s)}" for m, s in runs.items()))
        if len(runs) > 1:
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
    logs = gather(paths)
    if args.slim:
        print("wrote", *(save_slim(log, args.slim) for log in logs))
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # what cannot be told becomes NaN
        written, screen = compare(logs, args)
    print("\n".join(screen))
    print("wrote", *written)
    return 1 if failures else 0


def command_line():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: {message} (--help lists the options)\n")
    add = parser.add_argument
    add("logs", nargs="*", help="log files, or folders of them")
    add("--human", metavar="FILE", help="counts (N, 10) of how people labelled each image, .npy")
    add("--data", default="data", help="folder of the data sets, for the images of the report")
    add("--out", default=".", help="folder that receives figures/, and logs/ of --train")
    add("--slim", metavar="FOLDER", help="write small copies of the logs there, and stop")
    add("--train", action="store_true", help="first run the five scripts for the missing logs")
    add("--dataset", help="with --train: what to learn")
    add("--size", help="with --train: of the network")
    add("--seeds", type=int, default=3, help="with --train: seeds 0 to N - 1 of each method")
    add("--budget", type=float, help="with --train: of the methods that have one")
    add("--steps", type=int, help="with --train: stop each run after so many steps")
    add("--epochs", type=float, help="with --train: passes over the training split")
    add("--device", help="with --train: cpu or cuda")
    add("--jobs", type=int, default=0, help="with --train: runs at once; 0: one on a GPU, else one "
        "for each core, up to four")
    try:
        sys.exit(main(parser.parse_args()))
    except (UserError, OSError) as e:
        parser.exit(2, f"{parser.prog}: {e}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")


if __name__ == "__main__":
    command_line()
