"""The scripts repeat code on purpose; what is the same must stay the same, to the byte."""
import ast
import re

import pytest

from conftest import NAMES, ROOT

BANNER = "# Below: identical in all five scripts; read it once.\n"
FOUR = "# Below: identical in the four scripts that have a budget.\n"
BLOCK = re.compile(r"^# === shared: ([\w ]+) ===\n(.*?)^# === end shared ===$", re.M | re.S)
texts = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}


def test_what_is_below_the_banner_is_the_same_in_every_script():
    """All of it, in marked blocks; and those above it, if only some scripts share one."""
    below, first = {text.split(BANNER)[1] for text in texts.values()}, {}
    assert len(below) == 1
    assert not re.search(r"relu_sparsity|early_exit|gumbel_gates|moe\b|token_boost", below.pop())
    for name, text in texts.items():
        blocks = BLOCK.findall(text)
        assert text.count("# === shared: ") == text.count("# === end shared ===") == len(blocks) == 3 + (FOUR in text)
        for block, code in blocks:
            assert code == first.setdefault(block, code), f"'{block}' of {name}.py differs"


@pytest.mark.parametrize("name", NAMES)
def test_the_mechanism_comes_first(name):
    """Docstring without numbers, options, mechanism, Model and main; then what is shared."""
    text = texts[name]
    order = [text.index(part) for part in ("def options(", "# === the mechanism ===", "class Model(",
                                           "def main(", BANNER, "# === shared: static network ===")]
    assert order == sorted(order)
    own, shared = text.split(FOUR)[0].split(BANNER)[0].count("\n"), text.split(BANNER)[1].count("\n")
    assert own <= 250 and shared < 300 and (FOUR in text or text.count("\n") <= 450)
    doc = ast.get_docstring(ast.parse(text))
    assert doc.count("\n") < 25 and not re.search(r"\d %|\d nats", doc)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_fit_the_page(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []
