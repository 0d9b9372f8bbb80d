"""Who may import whom: DESIGN in one table."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

STANDARD_ONLY = {
    "sources",
    "turns",
    "schema",
    "layout",
    "model_path",
    "conversations",
    "report",
    "new_tokens",
    "hub",
    "hub_data",
}
OPTIONAL = {
    *("deepspeed", "bitsandbytes", "gptqmodel", "mpi4py", "optimum", "tiktoken", "datasets", "modelscope"),
    *("fastapi", "starlette", "uvicorn", "openai", "pydantic", "vllm", "gguf", "conversion", "lm_eval"),
}
LEAVES = {"errors", "messages", "machine", "console"}
# Folders of tuning/ and what each may import beside itself and the leaves.
MAY_IMPORT = {
    "errors": set(),
    "messages": set(),
    "machine": set(),
    "console": set(),
    "entry": set(),
    "settings": set(),
    "distributed": {"settings"},
    "model": {"settings", "distributed"},
    "planning": {"settings", "distributed", "model"},
    "checkpoint": {"settings", "distributed", "model"},
    "training": {"settings", "distributed", "model", "planning", "checkpoint"},
}
SCRIPTS = {"finetune", "merge_lora", "quantize", "chat", "serve", "evaluate"}
# Run as python -m, or the door for notebooks: they know what the scripts know, and nothing imports them.
SCRIPT_MODULES = {
    *("tuning.convert", "tuning.report"),
    *("inference.__init__", "inference.prove", "inference.export", "inference.evaluate"),
}
ENTRIES = {*SCRIPTS, "examples", "tests", "benchmarks"}
PACKAGES = {
    "data_utils": {"tuning", "inference", "commands", *ENTRIES},
    "tuning": {"data_utils", "inference", "commands", *ENTRIES},
    "inference": {"commands", *ENTRIES},
    "commands": ENTRIES,
}


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if is_module(name)} or {str(node.module)}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if dotted(path) not in SCRIPT_MODULES)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for package in PACKAGES for p in modules(package)], ids=dotted)
def test_packages_do_not_know_each_other_nor_an_entry_script(path):
    forbidden = PACKAGES[path.relative_to(ROOT).parts[0]]
    assert not {i.partition(".")[0] for i in imports(path)} & forbidden
    assert not imports(path) & SCRIPT_MODULES
    assert not {i.partition(".")[0] for i in imports(path, top_level_only=True)} & OPTIONAL


@pytest.mark.parametrize("path", [p for p in modules("tuning") if p.name != "__init__.py"], ids=dotted)
def test_inside_tuning_arrows_run_one_way(path):
    own = path.relative_to(ROOT / "tuning").with_suffix("").parts[0]
    allowed = MAY_IMPORT[own] | LEAVES | {own}
    imported = {i.split(".")[1] for i in imports(path) if i.startswith("tuning.")}
    assert imported <= allowed, f"{own} must not import {sorted(imported - allowed)}"


def test_modules_import_each_other_in_no_circle():
    graph = {dotted(p): {i for i in imports(p) if is_module(i)} for package in PACKAGES for p in modules(package)}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(STANDARD_ONLY))
def test_the_first_modules_need_only_the_standard_library(name):
    foreign = {
        i
        for i in imports(ROOT / "data_utils" / f"{name}.py", top_level_only=True)
        if i.partition(".")[0] not in sys.stdlib_module_names
    }
    assert all(each.partition(".")[2] in STANDARD_ONLY for each in foreign)


def test_finetune_stays_a_folder_of_launchers_beside_the_script():
    assert not (ROOT / "finetune" / "__init__.py").exists()
    assert not list(ROOT.glob("**/utils.py")) or all(".venv" in str(p) for p in ROOT.glob("**/utils.py"))


@pytest.mark.parametrize("name", [*sorted(SCRIPTS), *sorted(SCRIPT_MODULES), "data_utils.__main__"])
def test_mistakes_are_told_before_torch_is_imported(name):
    """What a script imports at its top answers --help, typos and wrong paths: none of it may take seconds."""
    heavy = {"torch", "transformers", "peft", "numpy", "pyarrow", "matplotlib", "datasets"}
    code = f"import {name}, sys; print(*sorted(sys.modules))"
    loaded = {each.partition(".")[0] for each in run_python("-c", code).stdout.split()}
    assert not loaded & heavy
