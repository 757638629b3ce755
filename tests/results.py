"""The README's tables of results, made from logs.

    python tests/results.py                            # from what is kept in .github/results
    python tests/results.py --keep logs/cifar10-small  # first keep these logs there, made slim
    python tests/results.py --keep token/logs/cifar10-small --variant "--grain token"

A row is a method, or a variant of one; mean over seeds, with the lowest and the highest where there
are several. Quality at a budget is read off the sweep of thresholds, on the straight line between
the two points around it.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compare_rankings import METHODS, find, load, markdown, save_slim, spread     # noqa: E402

KEPT, BUDGETS = ROOT / ".github/results", (0.6, 0.7, 0.85)
GAP = 0.15      # between points of a sweep


def keep(folder, variant):
    """Slim logs go to KEPT/<dataset>-<size>/; of variants only the meta and the curve, as JSON."""
    for path in find([folder]):
        log = load(path)
        if not variant:
            save_slim(log, KEPT)
            continue
        name = f"{log.meta['method']} {variant} s{log.meta['seed']}".replace(" ", "_")
        target = KEPT / f"{log.meta['dataset']}-{log.meta['size']}" / f"{name}.json"
        kept = dict(variant=variant, meta=log.meta, curve=np.round(log.curve, 5).tolist())
        target.write_text(json.dumps(kept, indent=1) + "\n")


def quality_at(curve, budget):
    """curve (2, S): MACs, quality -> quality at that many MACs; NaN outside of the curve, and where
    its points are so far apart that a straight line would be a guess."""
    macs, quality = np.asarray(curve)[:, np.argsort(curve[0], kind="stable")]
    after = np.searchsorted(macs, budget)
    if not 0 < after < len(macs) or macs[after] - macs[after - 1] > GAP:
        return np.nan
    return np.interp(budget, macs, quality)


def row(name, runs, better, digits):
    """runs: (meta, curve) of every seed."""
    def of(values):
        values = list(values)
        return "" if np.isnan(values).any() else spread(values, digits)

    time = {b: spread([meta["wall_clock"][f"skipping_ms_batch_{b}"]
                       / meta["wall_clock"][f"dense_ms_batch_{b}"] for meta, _ in runs])
            for b in (1, 256)}
    return [f"`{name}`", str(len(runs)), of(meta["full"][better] for meta, _ in runs),
            *(of(quality_at(curve, b) for _, curve in runs) for b in BUDGETS),
            spread([meta["at_budget"]["budget"] for meta, _ in runs], 3),
            of(meta["at_budget"][better] for meta, _ in runs), time[1], time[256]]


def tables():
    """Markdown: one table per data set and size."""
    lines = []
    for folder in sorted(path for path in KEPT.glob("*") if path.is_dir()):
        groups = {}
        for path in sorted(folder.glob("*.npz")):
            log = load(path)
            groups.setdefault(log.meta["method"], []).append((log.meta, log.curve))
        groups = {name: groups[name] for name in METHODS if name in groups}
        for path in sorted(folder.glob("*.json")):
            kept = json.loads(path.read_text())
            name = f"{kept['meta']['method']} {kept['variant']}"
            groups.setdefault(name, []).append((kept["meta"], kept["curve"]))
        metas = [meta for runs in groups.values() for meta, _ in runs]
        if not metas:
            continue
        better, digits = ("loss", 3) if metas[0]["dataset"] in ("shakespeare", "pydoc") else (
            "accuracy", 4)
        lines += [f"**{folder.name}** (dense twin {metas[0]['dense_macs']:,} MACs; "
                  f"{', '.join(sorted({meta['device'] for meta in metas}))}; torch "
                  f"{metas[0]['torch']})", "",
                  *markdown(["script", "seeds", f"{better}, full model",
                             *(f"at {b}" for b in BUDGETS), "MACs as logged", f"{better} there",
                             "time / dense, batch 1", "batch 256"],
                            [row(name, runs, better, digits) for name, runs in groups.items()])]
    return "\n".join(lines).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="FOLDER", help="a folder of logs to keep")
    parser.add_argument("--variant", help="the options that these logs were trained with")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep, args.variant)
    print(tables())
