"""Speed and memory of the scripts, as ratios to the static network. One table at a time:

    python tests/benchmark.py                       # skipping, in time and in MACs
    python tests/benchmark.py --table training      # examples/s and memory of training

Models are untrained; their threshold is about in the middle of its range, in MACs, on random input.
Medians of runs by turns in one process (memory: a process for each); machines are noisy, so read the
ratios.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from conftest import NAMES, build, configure, inputs, scripts, thresholds

DATASETS = ("shapes", "pydoc")
STATIC = scripts["relu_sparsity"]


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def stored(x):
    """Inputs as load_data returns them."""
    return (x * 0.25 + 0.47).clamp(0, 1).mul(255).byte() if x.ndim == 4 else x.byte()


def median_seconds(runs, repeats=10):
    """{name: function} -> {name: seconds}, by turns, after a warm-up."""
    seconds = {name: [] for name in runs}
    for _ in range(3 + repeats):
        for name, function in runs.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: np.median(taken[3:]) for name, taken in seconds.items()}


@torch.no_grad()
def skipping(size):
    """MACs and milliseconds of `skipping`, as the scripts log them."""
    print_row("script", "data", "MACs / static", "static ms, batch 1", "skipping / static",
              "static ms, batch 256", "skipping / static")
    print_row(*["---"] * 7)
    for name, script in scripts.items():
        for dataset in DATASETS:
            model, x = build(script, dataset, size), inputs(dataset, size, 512)
            threshold = model.full if script is STATIC else thresholds(model, x, (0.5,))[0]
            macs = model.skipping(x[:256], threshold)[1].double().mean() / model.net.macs
            ms = script.wall_clock(configure(script, dataset, size), model, stored(x), threshold)
            cells = [f"{ms[f'{run}_ms_batch_{b}'] / (1 if run == 'static' else ms[f'static_ms_batch_{b}']):.2f}"
                     for b in (1, 256) for run in ("static", "skipping")]
            print_row(name, dataset, f"{macs:.3f}", *cells)


def step_of(name, dataset, size):
    """A function that takes one training step, and how many examples that is."""
    script, cfg = scripts[name], configure(scripts[name], dataset, size)
    model, x = build(script, dataset, size).train(), inputs(dataset, size, cfg.batch)
    y = torch.randint(10, (cfg.batch, cfg.tokens) if cfg.text else (cfg.batch,))
    matrices = [p for p in model.net.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="original"), torch.optim.AdamW(others, 1e-3)]

    def step():
        model.zero_grad()
        model.loss(x, y, 0.5)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
    return step, cfg.batch


def training(size):
    """Examples/s of a training step, against the static network's (relu_sparsity trains just that),
    and the most memory that a process needs which takes three of them."""
    print_row("script", "data", "examples/s", "of the static", "peak memory, MB", "of the static")
    print_row(*["---"] * 6)
    for dataset in DATASETS:
        steps = {name: step_of(name, dataset, size) for name in NAMES}
        seconds = median_seconds({name: step for name, (step, _) in steps.items()})
        memory = {name: int(subprocess.check_output(
            [sys.executable, __file__, "--size", size, "--memory-of", name, dataset])) for name in NAMES}
        for name in NAMES:
            print_row(name, dataset, f"{steps[name][1] / seconds[name]:.0f}",
                      f"{seconds['relu_sparsity'] / seconds[name]:.2f}",
                      f"{memory[name]:,}", f"{memory[name] / memory['relu_sparsity']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(skipping=skipping, training=training)
    parser.add_argument("--table", choices=tables, default="skipping", help="default: skipping")
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base"), help="default: small")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step = step_of(*args.memory_of, args.size)[0]
        for _ in range(3):
            step()
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())   # Linux only
        print(int(peak[1]) // 1024)
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        tables[args.table](args.size)
