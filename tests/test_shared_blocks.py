"""The scripts repeat code on purpose; what is the same must stay the same, to the byte."""
import ast
import re

import pytest

from conftest import NAMES, ROOT

BANNER = "# Below: identical in every script (budgets: in four of the five); read it once.\n"
BUDGETS, REST = "# === shared: budgets ===", "# === shared: static network ==="
BLOCK = re.compile(r"^# === shared: ([\w ]+) ===\n(.*?)^# === end shared ===$", re.M | re.S)
texts = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}

def test_what_is_below_the_banner_is_the_same_in_every_script():
    """All of it, in marked blocks; budgets only where there is one."""
    below, first = {text.split(BANNER)[1].split(REST)[1] for text in texts.values()}, {}
    assert len(below) == 1
    for name, text in texts.items():
        assert not re.search(r"relu_sparsity|early_exit|gumbel_gates|moe\b|token_boost", text.split(BANNER)[1])
        blocks = BLOCK.findall(text)
        assert text.count("# === shared: ") == text.count("# === end shared ===") == len(blocks) == 3 + (BUDGETS in text)
        for block, code in blocks:
            assert code == first.setdefault(block, code), f"'{block}' of {name}.py differs"

@pytest.mark.parametrize("name", NAMES)
def test_the_mechanism_comes_first(name):
    """Docstring without numbers, options, mechanism, Model and main; then what is shared."""
    text = texts[name]
    order = [text.index(part) for part in ("def options(", "# === the mechanism ===", "class Model(",
                                           "def main(", BANNER, REST)]
    assert order == sorted(order)
    own, shared = text.split(BANNER)[0].count("\n"), text.split(REST)[1].count("\n")
    assert own <= 250 and shared < 300 and text.count("\n") < (550 if BUDGETS in text else 450)
    doc = ast.get_docstring(ast.parse(text))
    assert doc.count("\n") < 25 and not re.search(r"\d %|\d nats", doc)

@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_fit_the_page(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
