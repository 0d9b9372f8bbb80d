"""README and README_CN are one text in two languages; what they name exists."""

import re

import pytest

from tests.conftest import ROOT

READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")}


def blocks(text):
    return re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.M | re.S)


def outside(text):
    return re.sub(r"^```[a-z]*\n.*?^```\n", "", text, flags=re.M | re.S)


def test_the_same_headings_in_the_same_order():
    levels = [[len(h) for h in re.findall(r"^(#+) ", outside(text), flags=re.M)] for text in READMES.values()]
    assert levels[0] == levels[1]


def test_the_same_commands_and_outputs():
    english, chinese = (blocks(text) for text in READMES.values())
    assert english == chinese and len(english) > 8


def test_the_same_flags_in_text_and_tables():
    flags = [sorted(re.findall(r"`(--[a-z_]+|[a-z_]+\.(?:py|sh|json|yaml))", outside(t))) for t in READMES.values()]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("name", READMES)
def test_links_and_files_exist(name):
    text = READMES[name]
    for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"(?:python|bash|sh) ((?:examples|finetune)/\S+|\w+\.py)", text):
        script = script.strip("`")
        assert script.endswith("...") or (ROOT / script).exists(), script


def test_the_tree_names_every_module():
    tree = next(block for block in blocks(READMES["README.md"]) if "data_utils/" in block and "tuning/" in block)
    for folder in ("data_utils", "tuning"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name == "__init__.py" or f"  {path.name} " in tree, path
    for path in ROOT.glob("*.py"):
        assert f"{path.name} " in tree


def test_nothing_is_left_to_fill_in():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"\b[A-Z]+_OUTPUT\b|\bDEMO_STEPS\b|\bTODO\b", path.read_text(encoding="utf-8")), path
