"""Who may import whom: DESIGN in one table."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

STANDARD_ONLY = {"sources", "turns", "schema", "layout"}
OPTIONAL = {"deepspeed", "bitsandbytes", "gptqmodel", "mpi4py", "optimum", "tiktoken"}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module)}
    return found


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize(
    "path", [*modules("data_utils"), *modules("tuning")], ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_packages_do_not_know_each_other_nor_an_entry_script(path):
    other = {"data_utils": "tuning", "tuning": "data_utils"}[path.parent.name]
    assert not {i.partition(".")[0] for i in imports(path)} & {
        other,
        "finetune",
        "merge_lora",
        "quantize",
        "chat",
        "examples",
        "tests",
    }
    assert not {i.partition(".")[0] for i in imports(path, top_level_only=True)} & OPTIONAL


@pytest.mark.parametrize("name", sorted(STANDARD_ONLY))
def test_the_first_rooms_need_only_the_standard_library(name):
    foreign = {
        i
        for i in imports(ROOT / "data_utils" / f"{name}.py", top_level_only=True)
        if i.partition(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= {"data_utils.sources", "data_utils.turns"}


def test_finetune_stays_a_folder_of_launchers_beside_the_script():
    assert not (ROOT / "finetune" / "__init__.py").exists()
    assert not list(ROOT.glob("**/utils.py")) or all(".venv" in str(p) for p in ROOT.glob("**/utils.py"))
