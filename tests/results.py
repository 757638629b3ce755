"""Every table of numbers, made from the logs in .github/results.

    python tests/results.py             # print them
    python tests/results.py --write     # into .github/results and the README; a test compares them
    python tests/results.py --bound logs/cifar10-small/early_exit-s0.pt logs/cifar10-small/early_exit-s1.pt
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import early_exit   # noqa: E402
from compare_rankings import (   # noqa: E402
    METHODS, STATIC, Ranking, by_method, draw_quality, frontier, gather, markdown, number, pair_table,
    paying_table, rank, spread, study)

KEPT = ROOT / ".github/results"
IDEAS = dict(early_exit="leave when sure", gumbel_gates="learned gates skip tokens",
             moe="a router sends tokens to experts", token_boost="every token chooses learners")
DATA = dict(cifar10="JPEG copy of CIFAR-10", shakespeare="TinyShakespeare")

def static_table(logs):
    """Static networks of all widths and depths, trained alike: what MACs buy."""
    networks = by_method([log for log in logs if log.kind != "method"])
    macs = {name: runs[0].static_macs for name, runs in networks.items()}
    rows = []
    for name in sorted(macs, key=macs.get, reverse=True):
        runs = networks[name]
        rows.append([name, str(runs[0].meta["width"]), str(runs[0].meta["depth"]),
                     f"{macs[name] / 1e6:.2f} M", number(macs[name] / macs[STATIC]),
                     spread([log.meta["seconds"] / 60 for log in runs], 1),
                     ", ".join(str(log.seed) for log in runs),
                     spread([log.quality[-1] for log in runs], 4)])
    return markdown(["static network", "width", "depth", "MACs", "share", "minutes of training",
                     "seeds", f"test {'loss' if logs[0].text else 'accuracy'}"], rows)

def zeros_table(logs):
    """What the static network wastes: from what `relu_sparsity.py` writes into its log."""
    rows = []
    for name, runs in by_method(logs).items():
        density = [log.meta["density"] for log in runs]
        layers = np.mean([d["layers"] for d in density], 0)
        rows.append([name, spread([np.mean(d["layers"]) for d in density], 3),
                     " ".join(f"{share:.3f}" for share in layers),
                     spread([d["never"] for d in density], 0), spread([d["always"] for d in density], 0),
                     f"{density[0]['neurons']:,}", spread([log.macs.mean() for log in runs], 3),
                     spread([d["oracle_bound"] for d in density], 3),
                     *(spread(times) for times in zip(*(log.time for log in runs)))])
    return markdown(["network", "density", "by layer, first to last", "never fire", "always fire",
                     "of neurons", "MACs run", "oracle bound", "time, batch 1", "time, batch 256"], rows)

def time_table(logs):
    """What `skipping` takes at the chosen budget, beside the static network in the same process."""
    rows = [[name, spread([log.macs.mean() for log in runs], 3), *map(spread, zip(*(log.time for log in runs)))]
            for name, runs in by_method([log for log in logs if log.name in METHODS]).items()]
    return markdown(["method", "MACs", "time, batch 1", "time, batch 256"], rows)

def rankings(logs, resamples=300):
    """The five scripts as they are by default, and the loss of the static network -> rankings, study."""
    found = rank([log for log in logs if log.name in METHODS])[0]
    found += [Ranking("static loss", log.seed, log.loss) for log in logs if log.kind == "full"]
    return found, study(found, None if logs[0].text else logs[0].label, resamples)

def half_table():
    """What the README shows first: quality and time at half of the MACs."""
    rows = {name: [f"`{name}.py`", idea] for name, idea in IDEAS.items()}
    static, full = ["static networks of half the MACs", ""], ["the static network, all MACs", ""]
    for folder in DATA:
        logs = gather([KEPT / f"{folder}-small"])
        format = "{:.3f} nats".format if logs[0].text else "{:.2%}".format
        methods = by_method(logs)
        for name, row in rows.items():
            runs = [(log, log.point(0.5)) for log in methods[name]]
            row += [format(np.mean([log.quality[k] for log, k in runs])),
                    format(np.mean([log.random[k] for log, k in runs])),
                    f"{np.mean([log.time[1] for log, _ in runs]):.2f}"]
        static += [format(frontier(logs, 0.5 * methods[STATIC][0].static_macs)), "", ""]
        full += [format(np.mean([log.quality[-1] for log in methods[STATIC]])), "", "1"]
    return markdown(["script", "idea", "CIFAR-10", "at random", "time", "TinyShakespeare", "at random",
                     "time"], [*rows.values(), static, full])

def agreement_table():
    """How alike methods rank the examples: images below the diagonal, the text above it."""
    images, text = (rankings(gather([KEPT / f"{folder}-small"]), 1) for folder in DATA)
    names = list(by_method(images[0]))
    rho = np.tril(images[1]["disattenuated"], -1) + np.triu(text[1]["disattenuated"], 1)
    rows = [[a, *(number(rho[i, j]) if j != i else "" for j in range(len(names)))]
            for i, a in enumerate(names)]
    return markdown(["", *names], rows)

def fill(readme):
    """The README's text with its tables of numbers, which stand between marks."""
    for mark, lines in (("half", half_table()), ("agreement", agreement_table())):
        before, rest = readme.split(f"<!-- {mark} -->\n")
        readme = f"{before}<!-- {mark} -->\n" + "\n".join(lines) + "<!-- end -->\n" + rest.split("<!-- end -->\n", 1)[1]
    return readme

@torch.no_grad()
def bound(answers, exits):
    """Two early_exit.py weights: every example leaves at the first head of `exits` that is right, with the
    answer that the same head of `answers` gives. With another seed's exits this bounds honestly what a
    rule could reach; with its own it also counts heads that are right by luck."""
    right = []
    for path in (answers, exits):
        cfg = early_exit.options(["--load", path, "--device", "cpu"])
        model, (x, y) = early_exit.Model(cfg), early_exit.load_data(cfg)["test"]
        early_exit.load(path, model)
        heads = torch.cat([model.all_exits(some)[0].argmax(-1) for some in x.split(250)], 1)
        right.append(heads == y)                                                # (L, N), or (L, N, T)
    leaves = torch.cat([right[1][:-1], torch.ones_like(right[1][:1])]).int().argmax(0)
    rule, last = right[0].take_along_dim(leaves[None], 0).float().mean(), right[0][-1].float().mean()
    macs = (model.exit_macs / model.net.macs)[leaves].mean()
    return f"accuracy {rule:.4f} at {macs:.3f} of the MACs; of the last exit {last:.4f}"

def tables():
    """The whole of RESULTS.md."""
    lines = ["# Results", "", "Made by `python3 tests/results.py --write` from the logs in this folder. "
             "Mean (lowest to highest seed). Quality is the test split's; MACs, bound and time are shares "
             "of those of the same network, run in full. Of `small`, the static networks, experts, and exits on "
             "TinyShakespeare were trained on a CPU; their minutes are those of one thread, beside another run. All others "
             "were trained on one NVIDIA H200, up to twenty at once: `small` in float32, `base` in bfloat16, with the same "
             "steps in fewer launches (Muon's matrices of one shape in one batch, experts side by side); `base` before two "
             "changes: its learners' neurons were sorted wrongly in bfloat16, and it had eight experts, in every block.", ""]
    for folder in sorted({path.parent for path in KEPT.glob("*/*.npz")}):
        logs = gather([folder])
        metas = [log.meta for log in logs]
        threads, versions, device = (sorted({str(meta[key]) for meta in metas})
                                     for key in ("threads", "torch", "device"))
        lines += [f"## {folder.name}", "", f"{DATA[metas[0]['dataset']]}; {'; '.join(device)}, "
                  f"{', '.join(threads)} thread, torch {', '.join(versions)}. A row is "
                  f"`python3 relu_sparsity.py --dataset {metas[0]['dataset']} --size {metas[0]['size']}`, "
                  "with the `--width`, `--depth` and `--name` of the row and the seeds listed.", "",
                  *static_table(logs)]
        if any(log.name in METHODS and log.name != STATIC for log in logs):
            lines += ["Methods, `python3 METHOD.py` with the same options, all others as they are by default (a longer "
                      "name is the script with one option: `--grain`, `--estimator`, `--routing`, `--experts`, `--loss` branching, "
                      "or for hoyer `--sparsity-weight 0.1`); MACs, where they are calibrated to 0.35, 0.5, 0.6, 0.7 and 0.85 of the static network's:",
                      "", *paying_table(logs),
                      "Rankings by MACs at the chosen budget, of the five scripts as they are by default:", "",
                      *pair_table(*rankings(logs)),
                      "Time on one thread of a CPU, beside other runs (unknown: not measured there):", "",
                      *time_table(logs)]
        lines += ["Zeros of the networks above, at full width and depth:", "",
                  *zeros_table([log for log in logs if log.name.startswith(STATIC)])]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md instead of printing")
    parser.add_argument("--bound", nargs=2, metavar="FILE", help="how well exits could be chosen: answers' and exits' weights")
    cfg = parser.parse_args()
    if cfg.bound:
        print(bound(*cfg.bound))
    elif cfg.write:
        (KEPT / "RESULTS.md").write_text(tables(), encoding="utf-8")
        readme = ROOT / "README.md"
        readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
        logs = [log for log in gather([KEPT / "cifar10-small"]) if log.kind != "method" or log.name in METHODS]
        draw_quality(logs).savefig(KEPT / "quality.png", dpi=90)
    else:
        print(tables(), end="")
