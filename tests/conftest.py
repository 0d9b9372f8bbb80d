"""Small checkpoints built in code; the real vocabulary and real data where they lie beside the project."""

import gc
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # pytest runs a worker process a core; models this small gain nothing by threads
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from examples.tiny_model import build_tokenizer, read_texts

# No test asserts a time: how long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# Nothing of a test stays in the user's cache, and none finds what another version left there.
_CACHE = tempfile.TemporaryDirectory(prefix="tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
CONVERSATIONS = ROOT / "examples" / "conversations.json"


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # every run ends with a search for garbage, which then need not look through what was imported


def needs(*libraries: str) -> None:
    """Skip the test, or at a module's top all of its tests, where a library is not installed."""
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML control tokens and no chat template; of the tests' own, do not change it."""
    return build_tokenizer(read_texts(), vocabulary_size=1024)


@pytest.fixture(scope="session")
def real_tokenizer_path() -> Path:
    path = SHARED / "qwen_tokenizer" / "hf"
    if not path.is_dir():
        pytest.skip("the real Qwen vocabulary is not beside the project")
    return path


def build_model(tokenizer, *, tied: bool, seed: int = 0, **changes) -> Qwen3ForCausalLM:
    """A random two-layer Qwen3 with sharper weights than usual, so that differences show."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(tokenizer) + 8,  # some rows belong to no token, as in real checkpoints
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def build_moe(tokenizer) -> Qwen3MoeForCausalLM:
    """A random two-layer Qwen3-MoE; each token goes to two of eight experts."""
    dense = build_model(tokenizer, tied=False)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    torch.manual_seed(2)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(dense.config.to_diff_dict() | experts | {"model_type": "qwen3_moe"})))
    model.generation_config = dense.generation_config
    return model


@pytest.fixture(scope="session")
def checkpoints(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Base checkpoints on disk: "untied", "tied", "other" (other weights than "untied") and "moe" (with experts)."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, tied, seed in (("untied", False, 0), ("tied", True, 0), ("other", False, 1)):
        build_model(tokenizer, tied=tied, seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    build_moe(tokenizer).save_pretrained(root / "moe")
    tokenizer.save_pretrained(root / "moe")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def gptq(checkpoints, tmp_path_factory) -> dict[int, Path]:
    """The "untied" checkpoint quantised by quantize.py, by bits (4 and 8)."""
    needs("gptqmodel", "optimum")
    root = tmp_path_factory.mktemp("gptq")
    with ThreadPoolExecutor() as pool:
        words = [checkpoints["untied"], "--data", CONVERSATIONS, "--group_size", 32]
        list(pool.map(lambda bits: run_python("quantize.py", *words, root / str(bits), "--bits", bits), (4, 8)))
    return {bits: root / str(bits) for bits in (4, 8)}


@pytest.fixture(scope="session")
def golden(tokenizer, tmp_path_factory):
    """(the golden checkpoint in the original Qwen's layout, with a vocabulary; input ids; the original's logits)."""
    from safetensors.torch import load_file

    from tests.original_checkpoint import GOLDEN, write_golden

    if not GOLDEN.is_dir():
        pytest.skip("the golden original checkpoint is not beside the project")
    expected = load_file(GOLDEN / "expected.safetensors")
    directory = write_golden(tmp_path_factory.mktemp("golden") / "Qwen-tiny-Chat", tokenizer)
    return directory, expected["input_ids"], expected["logits"]


@pytest.fixture
def original(tokenizer, tmp_path):
    """Writes a checkpoint in the original Qwen's layout (tests/original_checkpoint.py)."""
    from tests.original_checkpoint import write_original

    return partial(write_original, tmp_path / "Qwen-small-Chat", tokenizer)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs finetune.py in forked processes, and hurts them on request (tests/forks.py)."""
    from tests.forks import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


@pytest.fixture
def write_json(tmp_path):
    """Write a value (or raw text) as a file; returns its path."""

    def write(value, name="data.json") -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_script(capfd, monkeypatch):
    """Run an entry script as __main__ in this process. Returns: exit code, stdout, stderr."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        monkeypatch.chdir(ROOT)
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code or 0
        return code, *capfd.readouterr()

    return run


def run_python(*words, timeout_s: int = 300, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run python in a fresh process from the project's root."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def tear(directory):
    """Leave a result as a kill at the end of its save does: whole, but not yet at its place."""
    from tuning.checkpoint.manifest import read_manifest
    from tuning.checkpoint.ownership import begin_result

    names = read_manifest(directory)["files"]
    unfinished = begin_result(directory)
    for name in [*names, "manifest.json"]:
        (directory / name).rename(unfinished / name)


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
