"""The scripts repeat code on purpose; what is the same must stay the same, to the byte."""
import re

import pytest

from conftest import NAMES, ROOT

BLOCK = re.compile(r"^ *# === shared: ([\w ]+) ===\n(.*?)^ *# === end shared ===$", re.M | re.S)
blocks = {name: dict(BLOCK.findall((ROOT / f"{name}.py").read_text())) for name in NAMES}


def test_every_block_is_the_same_in_every_script():
    first = blocks[NAMES[0]]
    assert {"options", "backbone", "data", "training", "evaluation"} <= set(first)
    for name in NAMES:
        assert list(blocks[name]) == list(first), f"{name}.py has other blocks"
        for block in first:
            assert blocks[name][block] == first[block], f"'{block}' of {name}.py differs"


@pytest.mark.parametrize("name", NAMES)
def test_markers_come_in_pairs_and_blocks_name_no_mechanism(name):
    text = (ROOT / f"{name}.py").read_text()
    assert text.count("# === shared: ") == text.count("# === end shared ===") == len(blocks[name])
    for block in blocks[name].values():
        assert not re.search(r"relu_sparsity|early_exit|gumbel|moe\b|token_boost", block)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_fit_the_page(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
