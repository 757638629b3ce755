"""The scripts repeat code on purpose; what is the same must stay the same, to the byte."""
import ast
import re

import pytest

from conftest import NAMES, ROOT

BLOCK = re.compile(r"^ *# === shared: ([\w ]+) ===\n(.*?)^ *# === end shared ===$", re.M | re.S)
texts = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}
COMMON = ["options", "static network", "data", "training", "evaluation", "log and picture"]


def test_every_block_is_the_same_in_every_script():
    """Six blocks stand in all, in one order; what only some share is the same in those."""
    first = {}
    for name, text in texts.items():
        blocks = dict(BLOCK.findall(text))
        assert [block for block in blocks if block in COMMON] == COMMON, f"{name}.py"
        for block, code in blocks.items():
            assert code == first.setdefault(block, code), f"'{block}' of {name}.py differs"
            assert not re.search(r"relu_sparsity|early_exit|gumbel_gates|moe\b|token_boost", code)
        assert text.count("# === shared: ") == text.count("# === end shared ===") == len(blocks)


@pytest.mark.parametrize("name", NAMES)
def test_the_mechanism_comes_first(name):
    """Docstring without numbers, options, mechanism, Model and main by line 250; then what is shared."""
    text = texts[name]
    banner = text.index("# Below: identical in all five scripts; read it once.")
    order = [text.index(part) for part in ("def options(", "# === the mechanism ===", "class Model(",
                                           "def main(", "# Below: identical", "# === shared: static")]
    assert order == sorted(order) and text[:banner].count("\n") < 250
    doc = ast.get_docstring(ast.parse(text))
    assert doc.count("\n") < 25 and not re.search(r"\d %|\d nats|0\.\d\d", doc)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_fit_the_page(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
