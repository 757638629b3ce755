"""What the README says is what the files say, and what it shows runs."""
import re

import pytest

import compare_rankings
import results
from conftest import ROOT, build, configure, scripts

readme = (ROOT / "README.md").read_text()
blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)

def test_results_are_what_the_command_makes():
    assert (results.KEPT / "RESULTS.md").read_text(encoding="utf-8") == results.tables()

def test_the_numbers_of_the_readme_are_what_the_command_makes():
    """Between marks; the text around them holds no result."""
    assert results.fill(readme) == readme
    prose = re.sub(r"^<!-- (half|agreement) -->.*?^<!-- end -->", "", readme, flags=re.M | re.S)
    assert not re.search(r"\d ?%|\d nats|rho|\d points", prose)

def test_every_option_in_the_readme_exists():
    options = set(re.findall(r"(?<=[ `])--([a-z-]+)", readme)) - {"help"}
    known = set()
    for path in (*(f"{name}.py" for name in scripts), "compare_rankings.py", "tests/results.py"):
        known |= set(re.findall(r'add(?:_argument)?\("--([a-z-]+)"', (ROOT / path).read_text()))
    assert options <= known, options - known

def test_what_is_named_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", readme) + re.findall(r"python3? (?:-m )?([\w/]+\.py)", readme)
    assert links and all((ROOT / path).exists() for path in links if "://" not in path)

@pytest.mark.parametrize("block", [b for b in blocks if "np.load" not in b],
                         ids=lambda block: re.search(r"from (\w+)", block).group(1))
def test_what_the_readme_shows_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, {})

def test_a_method_of_your_own(tmp_path, monkeypatch):
    """The README's example writes a log beside a real one; the comparison takes both."""
    monkeypatch.chdir(tmp_path)
    script = scripts["relu_sparsity"]
    cfg = configure(script)
    model, data = build(script), script.load_data(cfg)
    log = script.output_path(cfg, "logs", ".npz")
    result = script.evaluate(model, model.masked, data["test"], 0.0)
    script.save(log, cfg, data, model, result, [result])
    block, = (b for b in blocks if "np.load" in b)
    exec(block, {})
    logs = compare_rankings.gather([log.parent])
    assert [log.name for log in logs] == ["relu_sparsity", "brightness"]
