"""The README's table of results, made from the `meta` of logs.

    python tests/results.py                            # from what is kept in .github/results
    python tests/results.py --keep logs/cifar10-small  # first keep the meta of these logs there

A row is a method; mean over seeds, with the lowest and the highest where there are several.
"""
import argparse
import json
from pathlib import Path

import numpy as np

KEPT = Path(__file__).resolve().parent.parent / ".github/results"


def keep(folder, variant):
    """Write the meta of every log in `folder` to KEPT/<dataset>-<size>/<method>[-variant]-s<seed>.json."""
    for path in sorted(Path(folder).glob("*.npz")):
        meta = json.loads(str(np.load(path)["meta"]))
        name = "-".join(filter(None, (meta["method"], variant, f"s{meta['seed']}")))
        target = KEPT / f"{meta['dataset']}-{meta['size']}" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(meta, indent=1) + "\n")


def spread(values, digits):
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables():
    """Markdown: one table per data set and size."""
    lines = []
    for folder in sorted(path for path in KEPT.glob("*") if path.is_dir()):
        runs = {}
        for path in sorted(folder.glob("*.json")):
            runs.setdefault(path.stem.rsplit("-s", 1)[0], []).append(json.loads(path.read_text()))
        first = next(iter(runs.values()))[0]
        better, digits = ("loss", 3) if first["dataset"] in ("shakespeare", "pydoc") else ("accuracy", 4)
        lines += ["", f"**{folder.name}** ({first['device']}, torch {first['torch']}, dense twin "
                  f"{first['dense_macs']:,} MACs)", "",
                  f"| script | seeds | {better}, full model | MACs logged | {better} there | time of "
                  "`skipping` / dense, batch 1 | batch 256 | training, s | density |", "|" + "---|" * 9]
        for name, metas in runs.items():
            ratio = [[m["wall_clock"][f"skipping_ms_batch_{b}"] / m["wall_clock"][f"dense_ms_batch_{b}"]
                      for m in metas] for b in (1, 256)]
            lines.append("| " + " | ".join([
                f"`{name}`", str(len(metas)), spread([m["full"][better] for m in metas], digits),
                spread([m["at_budget"]["budget"] for m in metas], 3),
                spread([m["at_budget"][better] for m in metas], digits),
                spread(ratio[0], 2), spread(ratio[1], 2),
                spread([m["train_seconds"] for m in metas], 0),
                spread([m["zeros"]["density"] for m in metas], 3) if "zeros" in metas[0] else ""])
                + " |")
    return "\n".join(lines[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", metavar="FOLDER", help="a folder of logs whose meta to keep")
    parser.add_argument("--variant", help="a word for the options they were trained with")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep, args.variant)
    print(tables())
