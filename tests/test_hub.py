"""Models and data by name from the hubs, without a network: packages that stand in check what they are asked."""

import importlib.util
import inspect
import json
import shutil
import socket
import sys
import types

import datasets
import pytest

from data_utils import hub_data
from data_utils.conversations import DataOptions
from data_utils.dataset import load_rows
from data_utils.hub import choose_hub, fetch_model, find_cached_model
from data_utils.hub_data import HubData, find_data, read_name
from data_utils.sources import DataError, read_records
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.conftest import CONVERSATIONS, needs, run_python
from tuning.settings.other_tools import translate

ROWS = [
    {"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]} for n in range(6)
]

MODELSCOPE = """
import fnmatch, json, os, pathlib, shutil

def snapshot_download(model_id=None, revision=None, cache_dir=None, user_agent=None, local_files_only=False,
                      cookies=None, ignore_file_pattern=None, allow_file_pattern=None, local_dir=None,
                      allow_patterns=None, ignore_patterns=None, max_workers=None):
    remote = pathlib.Path(os.environ["FAKE_REMOTE"], model_id)
    if not remote.is_dir():
        raise ValueError(f"The request model: {model_id} does not exist!\\nmore")
    base = pathlib.Path(cache_dir or os.environ["MODELSCOPE_CACHE"])
    out = base / "models" / model_id.replace("/", "--") / "snapshots" / "master"
    out.mkdir(parents=True, exist_ok=True)
    for file in remote.iterdir():
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in ignore_patterns or []):
            shutil.copy2(file, out / file.name)
    with open(os.environ["FAKE_REMOTE"] + "/calls", "a") as calls:
        calls.write(json.dumps([model_id, cache_dir, ignore_patterns]) + "\\n")
    return str(out)
"""
OLD_MODELSCOPE = """
import os, re, pathlib

def snapshot_download(model_id, revision=None, cache_dir=None, ignore_file_pattern=None):
    assert all(re.compile(pattern) for pattern in ignore_file_pattern)
    assert any(re.search(pattern, "pytorch_model.bin") for pattern in ignore_file_pattern)
    assert not any(re.search(pattern, "model.safetensors") for pattern in ignore_file_pattern)
    return os.environ["FAKE_REMOTE"] + "/" + model_id
"""
MS_DATASETS = """
import datasets

class MsDataset:
    def __init__(self, data):
        self._hf_ds = data

    @staticmethod
    def load(dataset_name, namespace=None, target=None, version="master", hub=None, subset_name=None, split=None,
             trust_remote_code=True, **config):
        assert trust_remote_code is False and not config
        rows = [{"messages": [{"role": "user", "content": dataset_name}, {"role": "assistant", "content": "A"}]}]
        made = {name: MsDataset(datasets.Dataset.from_list(rows)) for name in ("train", "test")}
        return made[split] if split else made

    def to_hf_dataset(self):
        return self._hf_ds
"""


@pytest.fixture
def server():
    """An address that answers, as a hub would."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def modelscope(monkeypatch, tmp_path, checkpoints, server):
    """A modelscope package, its hub with the models Org/Base-1.5 and Org/Pickles, and an empty cache.

    Returns: writes the package with other code.
    """
    remote = tmp_path / "remote"
    shutil.copytree(checkpoints["untied"], remote / "Org" / "Base-1.5")
    (remote / "Org" / "Base-1.5" / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copytree(remote / "Org" / "Base-1.5", remote / "Org" / "Pickles")
    (remote / "Org" / "Pickles" / "model.safetensors").unlink()
    monkeypatch.setenv("FAKE_REMOTE", str(remote))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server)
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def write(code=MODELSCOPE):
        package = tmp_path / "packages" / "modelscope"
        (package / "msdatasets").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(code)
        (package / "msdatasets" / "__init__.py").write_text(MS_DATASETS)
        forget()

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
            del sys.modules[name]

    write()
    yield write
    forget()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


# ---- which hub ----


@pytest.mark.parametrize(
    ("flag", "variable", "hub"),
    [
        (None, None, "huggingface"),
        (None, "1", "modelscope"),
        (None, "True", "modelscope"),
        (None, "0", "huggingface"),
        ("huggingface", "1", "huggingface"),
        ("modelscope", None, "modelscope"),
    ],
)
def test_the_flag_wins_over_the_variable(monkeypatch, flag, variable, hub):
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    if variable is not None:
        monkeypatch.setenv("USE_MODELSCOPE_HUB", variable)
    assert choose_hub(flag) == hub


# ---- models ----


def test_a_model_is_downloaded_once_without_pickles(modelscope, tmp_path):
    assert fetch_model("Org/Base-1.5", hub=None) == "Org/Base-1.5", "a name of the other hub"
    directory = fetch_model("Org/Base-1.5", hub="modelscope")
    files = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "model.safetensors" in files and "pytorch_model.bin" not in files
    assert str(find_cached_model("Org/Base-1.5")) == directory
    (call,) = map(json.loads, (tmp_path / "remote" / "calls").read_text().splitlines())
    assert call[0] == "Org/Base-1.5" and "*.bin" in call[2] and "*.gguf" in call[2]
    fetch_model("Org/Base-1.5", hub="modelscope", allow_pickle=True, cache_dir=str(tmp_path / "other"))
    assert list((tmp_path / "other").rglob("pytorch_model.bin"))
    assert fetch_model(directory, hub="modelscope") == directory, "a directory is no name"


def test_only_the_tokenizer_where_no_weights_are_needed(modelscope, tmp_path):
    directory = fetch_model("Org/Base-1.5", hub="modelscope", tokenizer_only=True)
    assert load_tokenizer(directory) and not list((tmp_path / "cache").rglob("*.safetensors"))
    assert find_cached_model("Org/Base-1.5") is None, "a model without its weights is not taken for one"
    assert find_cached_model("Org/Base-1.5", tokenizer_only=True) is not None


def test_what_cannot_be_had_is_one_line(modelscope, monkeypatch):
    for name, message in (
        (
            "Org/Nothing",
            "Org/Nothing: cannot be downloaded from ModelScope: The request model: Org/Nothing does not exist!",
        ),
        ("Org/Pickles", "Org/Pickles: has no safetensors on ModelScope; .* pass --allow_pickle True"),
    ):
        with pytest.raises(DataError, match=message):
            fetch_model(name, hub="modelscope")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed_port())
    with pytest.raises(DataError, match="ModelScope cannot be reached from here; where it can: modelscope download"):
        fetch_model("Org/Base-1.5", hub="modelscope")


def test_older_versions_take_regular_expressions(modelscope, tmp_path):
    modelscope(OLD_MODELSCOPE)
    assert fetch_model("Org/Base-1.5", hub="modelscope") == str(tmp_path / "remote" / "Org" / "Base-1.5")


@pytest.mark.parametrize(
    "layout",
    [
        "models/Org--Base-1.5/snapshots/master",
        "models/Org--Base-1.5/snapshots/v1",
        "models/Org/Base-1___5",
        "hub/models/Org/Base-1___5",
        "hub/Org/Base-1___5",
        "Org/Base-1.5",
    ],
)
def test_every_layout_of_the_cache_is_found_without_network_or_package(monkeypatch, tmp_path, checkpoints, layout):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed_port())
    shutil.copytree(checkpoints["untied"], tmp_path / layout)
    assert fetch_model("Org/Base-1.5", hub="modelscope") == str(tmp_path / layout)
    (tmp_path / layout / "model.safetensors.index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    if importlib.util.find_spec("modelscope") is None:
        with pytest.raises(
            DataError, match=r"Org/Base-1\.5: ModelScope's hub needs its package: pip install modelscope"
        ):
            fetch_model("Org/Base-1.5", hub="modelscope")


def test_the_default_cache_is_the_users(monkeypatch, tmp_path, checkpoints):
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / ".cache" / "modelscope" / "hub" / "models" / "Org" / "Base-1___5"
    shutil.copytree(checkpoints["untied"], place)
    assert find_cached_model("Org/Base-1.5") == place


def test_the_scripts_take_names(modelscope, monkeypatch, run_script, tmp_path):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    words = ["--model_name_or_path", "Org/Base-1.5", "--data_path", CONVERSATIONS, "--output_dir", tmp_path / "out"]
    code, stdout, stderr = run_script("finetune.py", *words, "--dry_run", "--no_cache")
    assert code == 0 and "plan:" in stdout, stderr
    code, _, stderr = run_script("chat.py", "Org/Base-1.5", "--prompt", "Hi", "--max_new_tokens", 2)
    assert code == 0, stderr
    words[1] = "Org/Nothing"
    code, _, stderr = run_script("finetune.py", *words, "--dry_run")
    assert code == 2 and stderr.startswith("error: Org/Nothing: cannot be downloaded") and stderr.count("\n") == 1
    monkeypatch.delenv("USE_MODELSCOPE_HUB")
    monkeypatch.setattr(
        sys, "argv", ["x", "show", str(CONVERSATIONS), "--model", "Org/Base-1.5", "--hub", "modelscope", "--json"]
    )
    from data_utils.__main__ import main

    assert main() == 0


def test_the_real_package_takes_these_calls():
    needs("modelscope")
    from modelscope import snapshot_download

    inspect.signature(snapshot_download).bind("Org/Base", cache_dir="x", ignore_patterns=["*.bin"])


def test_a_hub_that_would_be_ignored_is_refused(checkpoints, run_script, tmp_path):
    words = [
        "--model_name_or_path",
        checkpoints["untied"],
        "--data_path",
        CONVERSATIONS,
        "--output_dir",
        tmp_path / "out",
    ]
    code, _, stderr = run_script("finetune.py", *words, "--hub", "modelscope")
    assert code == 2 and stderr == "error: --hub modelscope: has no effect, as --model_name_or_path is a directory\n"
    code, _, stderr = run_script("chat.py", checkpoints["untied"], "--hub", "huggingface")
    assert code == 2 and "--hub huggingface: has no effect" in stderr


# ---- data ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:squad", HubData("hf", "squad")),
        ("hf:org/set", HubData("hf", "org/set")),
        ("hf:org/set#5", HubData("hf", "org/set", None, None, 5)),
        ("ms:org/set.v1/main:test", HubData("ms", "org/set.v1", "main", "test")),
        ("hf:org/set:train[:10%]#7", HubData("hf", "org/set", None, "train[:10%]", 7)),
    ],
)
def test_names_of_data(text, expected):
    assert read_name(text) == expected


@pytest.mark.parametrize("text", ["hf:", "hf:/x", "hf:a/b/c/d", "hf:a/b#0", "hf:a/b#x", "ms:a b/c", "hf:a/b:"])
def test_other_forms_are_refused(text):
    with pytest.raises(DataError, match=r"expected (hf|ms):OWNER/NAME, then /SUBSET, :SPLIT and #ROWS"):
        read_name(text)


@pytest.fixture
def load_dataset(monkeypatch, tmp_path):
    """Stands in for datasets.load_dataset; serves what it is given, and remembers its arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_data._fetch.cache_clear()
    served = types.SimpleNamespace(splits={"train": ROWS}, calls=[], error=None)
    real = inspect.signature(datasets.load_dataset)

    def load(*args, **options):
        real.bind(*args, **options)
        served.calls.append((args, options))
        if served.error is not None:
            raise served.error
        made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in served.splits.items()})
        return made[options["split"]] if options.get("split") else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    yield served
    hub_data._fetch.cache_clear()


def test_rows_of_a_data_set_are_rows_of_a_file(load_dataset, checkpoints):
    (source,) = find_data(["hf:org/set"])
    assert str(source) == "hf:org/set:train" and load_dataset.calls == [(("org/set", None), {"split": None})]
    records = list(read_records(source))
    assert [record.value for record in records] == ROWS
    assert [record.where for record in records] == [f"hf:org/set:train:{row}" for row in range(1, 7)]
    _, account = load_rows(["hf:org/set#4", CONVERSATIONS], ChatTemplate(load_tokenizer(str(checkpoints["untied"]))))
    assert account.files[0]["path"] == "hf:org/set:train#4" and account.files[0]["conversations"] == 4
    assert len(load_dataset.calls) == 1, "once a process"


def test_every_row_is_trained_or_counted_with_its_place(load_dataset, checkpoints):
    bad = {"messages": [{"role": "robot", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    load_dataset.splits = {"test": [*ROWS[:2], bad, {"messages": None}]}
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    with pytest.raises(DataError) as error:
        load_rows(["hf:org/set"], template)
    assert "hf:org/set:test:3: messages[0].role: 'robot' is not a role" in str(error.value)
    assert "hf:org/set:test:4: " in str(error.value) and ".parquet" not in str(error.value)
    rows, account = load_rows(["hf:org/set"], template, DataOptions(on_bad_row="skip"))
    assert (len(rows), account.num_problems, account.conversations) == (2, 2, 4)


def test_changed_data_are_read_anew_and_equal_ones_are_written_once(load_dataset, tmp_path):
    find_data(["hf:org/set:train"])
    hub_data._fetch.cache_clear()
    find_data(["hf:org/set:train"])
    files = list((tmp_path / "cache").rglob("*.parquet"))
    load_dataset.splits = {"train": ROWS[:1]}
    hub_data._fetch.cache_clear()
    (source,) = find_data(["hf:org/set:train"])
    assert len(list(read_records(source))) == 1 and source.path not in files
    assert not list((tmp_path / "cache").rglob("finetune/hub-data/.*"))


@pytest.mark.parametrize(
    ("splits", "wanted", "message"),
    [
        ({"a": ROWS, "b": ROWS}, "hf:org/set", "hf:org/set: name a split: hf:org/set:a, hf:org/set:b"),
        (ValueError("Config name is missing.\nPick one"), "hf:org/set", "missing.; name a subset: hf:org/set/SUBSET"),
        (ConnectionError(), "hf:org/set/main", "hf:org/set/main: cannot be loaded: ConnectionError; it is not"),
    ],
)
def test_what_is_not_there_is_one_line(load_dataset, splits, wanted, message):
    load_dataset.splits, load_dataset.error = (splits, None) if isinstance(splits, dict) else ({}, splits)
    with pytest.raises(DataError) as error:
        find_data([wanted])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_real_library_reads_splits_parts_and_rows_of_several_shapes(monkeypatch, tmp_path):
    """It takes a directory of that name for the data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    rows = [*ROWS[:3], {**ROWS[3], "system": "S", "tools": None}]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in (rows if split == "train" else ROWS[:1]))
        (tmp_path / "org" / "set" / f"{split}.jsonl").write_text(text)
    hub_data._fetch.cache_clear()
    for name, expected in (
        ("hf:org/set", [*ROWS[:3], {**ROWS[3], "system": "S"}]),
        ("hf:org/set:test", ROWS[:1]),
        ("hf:org/set:train[:50%]", ROWS[:2]),
        ("hf:org/set:train+test", [*ROWS[:3], {**ROWS[3], "system": "S"}, ROWS[0]]),
    ):
        (source,) = find_data([name])
        assert [record.value for record in read_records(source)] == expected
    with pytest.raises(DataError, match='hf:org/set:nothing: cannot be loaded: Unknown split "nothing"'):
        find_data(["hf:org/set:nothing"])


def test_data_of_modelscope(modelscope, load_dataset):
    (source,) = find_data(["ms:Org/set/main:test#1"])
    assert str(source) == "ms:Org/set/main:test#1" and source.name == "main:test"
    (record,) = read_records(source)
    assert record.value["messages"][0]["content"] == "Org/set" and record.where == "ms:Org/set/main:test:1"
    (source,) = find_data(["ms:Org/set"])
    assert str(source) == "ms:Org/set:train"


def test_what_is_no_table_of_rows_is_one_line(load_dataset, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: object())
    with pytest.raises(DataError, match="hf:org/set:train: is a object, not a table of rows"):
        find_data(["hf:org/set"])


def test_a_missing_package_is_one_line(tmp_path):
    blocked = tmp_path / "datasets.py"
    blocked.write_text("raise ImportError('no')")
    done = run_python(
        "-m", "data_utils", "check", "hf:org/set", check=False, PYTHONPATH=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 2
    assert done.stderr == "error: hf:org/set: needs the package datasets: pip install datasets\n"
    if importlib.util.find_spec("modelscope") is None:
        done = run_python("-m", "data_utils", "check", "ms:org/set", check=False)
        assert done.stderr == "error: ms:org/set: ModelScope's hub needs its package: pip install modelscope\n"


def test_names_in_files_of_other_tools_become_names_here():
    trl = {"dataset_name": "org/set", "dataset_config": "main", "dataset_train_split": "test"}
    assert "- hf:org/set/main:test" in translate(trl)
    assert "- hf:org/set:train" in translate({"datasets": [{"path": "org/set", "split": "train", "type": "alpaca"}]})
    assert "- rows/a.jsonl" in translate({"datasets": [{"path": "rows/a.jsonl"}]})
