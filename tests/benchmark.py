"""Speed and memory of the scripts, as ratios to the dense twin. Four tables, one at a time:

    python tests/benchmark.py                       # skipping against the dense twin, in time and MACs
    python tests/benchmark.py --table training      # examples/s and memory of training against the twin's
    python tests/benchmark.py --table experts       # the experts' layer against dense MLPs
    python tests/benchmark.py --table mlps          # what the MLPs are of the twin's MACs, and of its time

Models are untrained; their threshold spends about the middle of what it can on random input. Medians
of runs by turns in one process (memory: a process for each); machines are noisy, so read the ratios.
"""
import argparse
import itertools
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conftest import NAMES, build, inputs, scripts, thresholds

moe = scripts["moe"]
DATASETS = ("shapes", "pydoc")


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def stored(x):
    """Inputs as a Data holds them."""
    return (x * 0.25 + 0.47).clamp(0, 1).mul(255).byte() if x.ndim == 4 else x.byte()


def skipping(size):
    """MACs and milliseconds of `skipping` against the twin's forward pass, as the scripts log it."""
    print_row("script", "data", "MACs / dense", "dense ms, batch 1", "skipping / dense",
              "dense ms, batch 256", "skipping / dense")
    print_row(*["---"] * 7)
    for name in NAMES:
        for dataset in DATASETS:
            script, x = scripts[name], inputs(dataset, size, 512)
            model = build(script, dataset, size)
            cfg = script.Config(dataset=dataset, size=size, device="cpu")
            threshold = model.full if name == "relu_sparsity" else thresholds(model, x, (0.5,))[0]
            labels = torch.zeros(512, *([cfg.tokens] * cfg.text)).byte()
            macs = script.evaluate(model.skipping, (stored(x), labels), threshold)["macs"].mean()
            ms = script.wall_clock(model, stored(x), threshold, cfg)
            cells = [f"{ms[f'{run}_ms_batch_{b}'] / (1 if run == 'dense' else ms[f'dense_ms_batch_{b}']):.2f}"
                     for b in (1, 256) for run in ("dense", "skipping")]
            print_row(name, dataset, f"{macs / model.dense_macs:.3f}", *cells)


def step_of(name, dataset, size):
    """A function that takes one training step, and how many examples that is."""
    script = scripts[name]
    cfg = script.Config(dataset=dataset, size=size, device="cpu")
    model, x = build(script, dataset, size).train(), inputs(dataset, size, cfg.batch)
    y = torch.randint(10, (cfg.batch, cfg.tokens) if cfg.text else (cfg.batch,))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = script.objective(model, x, y)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step, cfg.batch


def training(size):
    """Examples/s of a training step, against the static twin's (relu_sparsity trains just that), and
    the most memory that a process needs which takes three of them."""
    print_row("script", "data", "examples/s", "of the twin's", "peak memory, MB", "of the twin's")
    print_row(*["---"] * 6)
    for dataset in DATASETS:
        steps = {name: step_of(name, dataset, size) for name in NAMES}
        seconds, memory = {name: [] for name in NAMES}, {}
        for i in range(3 + 10):
            for name, (step, _) in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        for name in NAMES:
            command = [sys.executable, __file__, "--size", size, "--memory-of", name, dataset]
            memory[name] = int(subprocess.check_output(command))
        speed = {name: steps[name][1] / np.median(seconds[name][3:]) for name in NAMES}
        for name in NAMES:
            print_row(name, dataset, f"{speed[name]:.0f}", f"{speed[name] / speed['relu_sparsity']:.2f}",
                      f"{memory[name]:,}", f"{memory[name] / memory['relu_sparsity']:.2f}")


def experts(size, repeats=20):
    """`dispatch` and its router, forward and backward in float32, against the dense MLP of as many MACs
    and that of as many parameters, at the load of the default budget: the default experts, and half as
    many of twice the size."""
    print_row("data", "experts", "tokens", "layer", "forward ms", "forward and backward ms",
              "of the dense of equal MACs")
    print_row(*["---"] * 7)
    for dataset, halves, tokens in itertools.product(DATASETS, (1, 2), (4096, 16384)):
        cfg = moe.Config(dataset=dataset, size=size, device="cpu")
        cfg = replace(cfg, experts=cfg.experts // halves, hidden=cfg.hidden * halves)
        model = moe.Model(cfg)
        block, router, (C, E, h) = model.twin.blocks[0], model.routers[0], (
            model.twin.width, model.experts, model.hidden)
        x = torch.randn(tokens, C, requires_grad=True)
        needed = moe.need(router(x).softmax(-1).detach(), "top_p")
        chosen = needed < moe.threshold_for(needed, model.k)

        def routed(x):
            p = router(x).softmax(-1)
            moe.need(p.detach(), "top_p")
            return moe.dispatch(x, p * chosen, block.up, block.down)

        same_macs = round(model.k * h + E / 2)              # its router counts, too
        runs = {f"dense, {name}": nn.Sequential(nn.Linear(C, n), nn.ReLU(), nn.Linear(n, C))
                for name, n in (("equal MACs", same_macs), ("equal parameters", E * h))}
        runs["experts"], seconds = routed, {}
        for i in range(3 + repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                y = run(x)
                middle = time.perf_counter()
                y.square().sum().backward()
                seconds.setdefault(name, []).append((middle - start, time.perf_counter() - start))
        medians = {name: 1000 * np.median(s[3:], 0) for name, s in seconds.items()}
        for name, (forward, both) in medians.items():
            print_row(dataset, f"{E} of {h}", f"{tokens:,}", name, f"{forward:.2f}", f"{both:.2f}",
                      f"{both / medians['dense, equal MACs'][1]:.2f}")


@torch.no_grad()
def mlps(size, repeats=10):
    """The MLPs' share of the twin's MACs, and of its time in batches of 256: the dense forward pass
    with and without them. Who saves MACs in MLPs alone cannot save more than that share of the time."""
    print_row("data", "of the MACs", "of the time")
    print_row(*["---"] * 3)
    for dataset in DATASETS:
        script = scripts["relu_sparsity"]
        twin, x = build(script, dataset, size).twin, inputs(dataset, size, 256)

        def without():
            tokens = twin.embed(x)
            for block in twin.blocks:
                tokens = block.attend(tokens)
            return twin.readout(tokens)

        seconds = {}
        for i in range(3 + repeats):
            for run in (without, lambda: twin(x)):
                start = time.perf_counter()
                run()
                seconds.setdefault(run is without, []).append(time.perf_counter() - start)
        medians = {key: np.median(s[3:]) for key, s in seconds.items()}
        macs = twin.tokens * len(twin.blocks) * twin.blocks[0].mlp_macs / twin.dense_macs
        print_row(dataset, f"{macs:.3f}", f"{1 - medians[True] / medians[False]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = dict(skipping=skipping, training=training, experts=experts, mlps=mlps)
    parser.add_argument("--table", choices=tables, default="skipping")
    parser.add_argument("--size", default="small", choices=("tiny", "small", "base"))
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
