"""The scripts repeat code on purpose; what is the same must stay the same, to the byte."""
import re

import pytest

from first_edition.conftest import NAMES, ROOT

BLOCK = re.compile(r"^ *# === shared: ([\w ]+) ===\n(.*?)^ *# === end shared ===$", re.M | re.S)
blocks = {name: dict(BLOCK.findall((ROOT / f"{name}.py").read_text())) for name in NAMES}


COMMON = ["options", "backbone", "data", "training", "evaluation", "log and command line", "pictures"]


def test_every_block_is_the_same_in_every_script():
    """Seven blocks stand in all five, in one order; what only some share is the same in those."""
    first = {}
    for name in NAMES:
        assert [block for block in blocks[name] if block in COMMON] == COMMON, f"{name}.py"
        for block, text in blocks[name].items():
            assert text == first.setdefault(block, text), f"'{block}' of {name}.py differs"
    for block in set(first) - set(COMMON):
        assert sum(block in blocks[name] for name in NAMES) > 1, f"nobody shares '{block}'"


@pytest.mark.parametrize("name", NAMES)
def test_markers_come_in_pairs_and_blocks_name_no_mechanism(name):
    text = (ROOT / f"{name}.py").read_text()
    assert text.count("# === shared: ") == text.count("# === end shared ===") == len(blocks[name])
    for block in blocks[name].values():
        block = block.replace("relu_sparsity-s{cfg.seed}.npz", "")      # the log of the static twin
        assert not re.search(r"relu_sparsity|early_exit|gumbel_gates|moe\b|token_boost", block)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_fit_the_page(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
