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


def test_the_tree_is_the_tree():
    tree = next(block for block in blocks(READMES["README.md"]) if "data_utils/" in block and "tuning/" in block)
    named, folders = set(), []
    for name, depth in ((line.split()[0], (len(line) - len(line.lstrip())) // 2) for line in tree.splitlines() if line):
        folders[depth:] = [name]
        if name.endswith(".py"):
            named.add("".join(folders))
    rooms = ("data_utils", "tuning", "inference", "commands")
    modules = {path for room in rooms for path in (ROOT / room).rglob("*.py")} | set(ROOT.glob("*.py"))
    assert named == {path.relative_to(ROOT).as_posix() for path in modules if path.name != "__init__.py"}


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_pages_name_files_that_exist(page):
    rooms = [ROOT, ROOT / "data_utils", ROOT / "tuning", ROOT / "finetune", page.parent]
    for name in re.findall(r"(?<![\w./*-])(?:\w+/)*\w+\.(?:py|sh|sbatch)\b", page.read_text(encoding="utf-8")):
        assert any((room / name).exists() for room in rooms) or any(ROOT.glob(f"*/**/{name}")), name


def test_nothing_is_left_to_fill_in():
    for path in PAGES:
        assert not re.search(r"\b[A-Z]+_OUTPUT\b|\bDEMO_STEPS\b|\bTODO\b", path.read_text(encoding="utf-8")), path
