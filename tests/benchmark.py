"""Time and MACs of `skipping` against the dense twin, for every script that is there.

    python tests/benchmark.py [--size small] [--log-folder logs/cifar10-small]

Without logs the models are untrained and their threshold spends the default budget on random input;
with a folder of logs the figures are those that the scripts measured and logged after training.
Medians, float32, both runs by turns in one process; machines are noisy, so read the ratios.
"""
import argparse
import json

import numpy as np
import torch

from conftest import NAMES, ROOT, build, inputs, scripts, thresholds


def measure(name, dataset, size):
    script, x = scripts[name], inputs(dataset, size, 512)
    model = build(script, dataset, size)
    cfg = script.Config(dataset=dataset, size=size, device="cpu")
    threshold = model.full if name == "relu_sparsity" else thresholds(model, x, (0.5,))[0]
    stored = (x * 0.25 + 0.47).clamp(0, 1).mul(255).byte() if x.ndim == 4 else x.byte()
    macs = script.evaluate(model.skipping, (stored, torch.zeros(512, *([64] * (x.ndim == 2))).byte()),
                           threshold)["macs"].mean() / model.dense_macs
    return macs, script.wall_clock(model, stored, threshold, cfg)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base"))
    parser.add_argument("--log-folder", help="print what the logs in this folder measured instead")
    args = parser.parse_args()
    print("| script | data | MACs / dense | dense ms, batch 1 | skipping / dense | dense ms, batch 256 "
          "| skipping / dense |\n|---|---|---|---|---|---|---|")
    rows = []
    if args.log_folder:
        for path in sorted((ROOT / args.log_folder).glob("*.npz")):
            meta = json.loads(str(np.load(path)["meta"]))
            rows.append((path.stem, meta["dataset"], meta["at_budget"]["budget"], meta["wall_clock"]))
    else:
        rows = ((n, d, *measure(n, d, args.size)) for n in NAMES for d in ("shapes", "pydoc"))
    for name, dataset, macs, ms in rows:
        pairs = [(ms[f"dense_ms_batch_{b}"], ms[f"skipping_ms_batch_{b}"]) for b in (1, 256)]
        columns = [f"{dense:.2f} | {skipping / dense:.2f}" for dense, skipping in pairs]
        print(f"| {name} | {dataset} | {macs:.3f} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
