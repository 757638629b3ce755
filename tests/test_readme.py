"""What the README says is what the files say."""
import re

from conftest import NAMES, ROOT
from results import tables

readme = (ROOT / "README.md").read_text()


def test_tables_are_what_the_command_prints():
    block = re.search(r"<!-- results -->\n(.*?)\n<!-- end -->", readme, re.S)
    assert block and block.group(1).strip() == tables().strip()


def test_every_command_names_a_script_that_is_there():
    named = set(re.findall(r"python3? (?:-m )?([\w/]+\.py)", readme))
    assert named and all((ROOT / path).exists() for path in named)
    assert {f"{name}.py" for name in NAMES} <= set(re.findall(r"\w+\.py", readme))


def test_every_option_in_the_readme_exists():
    from conftest import scripts
    options = set(re.findall(r"(?<=[ `])--([a-z-]+)", readme)) - {"help", "keep"}
    known = {field.name.replace("_", "-") for script in scripts.values()
             for field in script.fields(script.Config)}
    assert options <= known, options - known
