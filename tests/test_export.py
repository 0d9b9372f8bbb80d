"""python -m inference.export, with a stand-in for llama.cpp's converter; test_llama_cpp.py has the real one."""

import json
import shutil

import pytest
from transformers import GenerationConfig

from data_utils.tokenizer import load_tokenizer
from inference import export
from tests.conftest import build_model
from tests.test_gguf_file import write_gguf
from tuning.errors import MachineError, SettingsError

STAND_IN = """
import json, pathlib, shutil, sys
from conversion.base import TextModel
here, staged = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[1])
files = {path.name: path.read_text() for path in staged.iterdir() if path.suffix in (".json", ".jinja")}
said = {"files": sorted(path.name for path in staged.iterdir()), "words": sys.argv[2:]}
said["pre"] = TextModel().get_vocab_base_pre(None)
(here / "said.json").write_text(json.dumps(said | {"texts": files}))
if (here / "log.txt").exists():
    sys.exit((here / "log.txt").read_text())
shutil.copy(here / "made.gguf", sys.argv[sys.argv.index("--outfile") + 1])
"""
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
"""


@pytest.fixture
def model(tokenizer, tmp_path):
    """A standalone model that stops at <|im_end|>."""
    path = tmp_path / "My model"
    own = build_model(tokenizer, tied=False)
    stop_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    own.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[1])
    own.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def llama_cpp(model, tmp_path):
    """A directory with a converter that writes the right file, and notes what it was given."""
    path = tmp_path / "llama.cpp"
    (path / "conversion").mkdir(parents=True)
    (path / "conversion" / "base.py").write_text(BASE)
    (path / "convert_hf_to_gguf.py").write_text(STAND_IN)
    write_gguf(path / "made.gguf", model, load_tokenizer(str(model)), eos=0, bos=True)
    return path


def run(model, out, llama_cpp, *words):
    export.main([str(model), str(out), "--llama_cpp", str(llama_cpp), *words])


def test_a_gguf_file_is_written_and_described(model, llama_cpp, tmp_path, capsys):
    out = tmp_path / "out"
    run(model, out, llama_cpp, "--to", "gguf")
    assert capsys.readouterr().out.splitlines() == [
        f"exported: {out}/My_model.gguf (f32)",
        f"as in {model}: chat template, stop token <|im_end|> (1023), 1,024 tokens; 25 tensors are equal",
    ]
    assert {path.name for path in out.iterdir()} == {"My_model.gguf", "manifest.json"}
    assert json.loads((llama_cpp / "said.json").read_text())["pre"] == "qwen2"  # its hash is not known, its splits are
    run(model, out, llama_cpp, "--to", "ollama", "--overwrite")
    assert {path.name for path in out.iterdir()} == {"My_model.gguf", "manifest.json", "Modelfile"}
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./My_model.gguf\nTEMPLATE """{{ range') and 'stop "<|im_end|>"' in modelfile


def test_the_converter_gets_no_code_and_the_template_that_is_used_here(model, llama_cpp, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil/repository--code.Model"}}))
    described = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(described | {"auto_map": {"AutoTokenizer": ["x.T", None]}}))
    (model / "code.py").write_text("raise SystemExit('ran')")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    run(model, tmp_path / "out", llama_cpp, "--to", "gguf")
    said = json.loads((llama_cpp / "said.json").read_text())
    assert not any(name.endswith((".py", ".bin")) for name in said["files"])
    assert "auto_map" not in "".join(said["texts"].values())
    assert said["texts"]["chat_template.jinja"] == load_tokenizer(str(model)).get_chat_template()


def test_the_runs_system_message_is_exported_or_told(model, llama_cpp, tmp_path, capsys):
    run_record = {"settings": {"data": {"system_message": "Be brief."}}}
    (model / "run.json").write_text(json.dumps(run_record))
    run(model, tmp_path / "a", llama_cpp, "--to", "gguf")
    assert "note: trained with --system_message 'Be brief.', which no GGUF holds" in capsys.readouterr().out
    run(model, tmp_path / "b", llama_cpp, "--to", "ollama")
    assert 'SYSTEM """Be brief."""\n' in (tmp_path / "b" / "Modelfile").read_text()


def test_other_named_templates_are_told(model, llama_cpp, tmp_path, capsys):
    (model / "chat_template.jinja").write_text(load_tokenizer(str(model)).get_chat_template())
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}{{ messages }}")
    run(model, tmp_path / "out", llama_cpp, "--to", "gguf")
    assert (
        "note: of the named chat templates only the default one is exported, without tool_use"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (
            "INFO:hf-to-gguf:Loading\nERROR:hf-to-gguf:Model X is not supported",
            SettingsError,
            "Model X is not supported",
        ),
        ("Traceback:\n  File x\nValueError: Can not map tensor 'y'\n", SettingsError, "Can not map tensor 'y'"),
        ("NotImplementedError: BPE pre-tokenizer was not recognized - z", SettingsError, "how this tokenizer splits"),
        ("** BPE pre-tokenizer was not recognized! **\nKeyError: 'x'", SettingsError, r"fails: KeyError: 'x'"),
        (
            "  File x\n    assert a != b\n           ^^^^^^\nAssertionError",
            SettingsError,
            "AssertionError: assert a != b",
        ),
        ("OSError: [Errno 28] No space left on device", MachineError, "make room"),
    ],
)
def test_a_converter_that_fails_is_quoted_and_leaves_nothing(model, llama_cpp, tmp_path, log, error, message):
    (llama_cpp / "log.txt").write_text(log)
    with pytest.raises(error, match=message) as caught:
        run(model, tmp_path / "out", llama_cpp, "--to", "ollama")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_fit_is_not_kept(model, llama_cpp, tmp_path):
    run(model, tmp_path / "out", llama_cpp, "--to", "gguf")
    before = (tmp_path / "out" / "My_model.gguf").read_bytes()
    (llama_cpp / "made.gguf").unlink()
    write_gguf(llama_cpp / "made.gguf", model, load_tokenizer(str(model)), chat_template="{{ messages }}")
    with pytest.raises(SettingsError, match="another chat template"):
        run(model, tmp_path / "out", llama_cpp, "--to", "gguf", "--overwrite")
    assert (tmp_path / "out" / "My_model.gguf").read_bytes() == before


def test_mistakes_are_named_before_anything_is_written(model, llama_cpp, checkpoints, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    for path, out, words, message in (
        (adapter, "out", [], "is an adapter; merge it first: python merge_lora.py"),
        (tmp_path / "absent", "out", [], "absent"),
        (checkpoints["untied"], "out", [], r"ends answers with <\|im_end\|>, which ends no generation"),
        (pickled, "out", [], "its weights are pickles"),
        (model, "full", ["--overwrite"], "is no result of this program"),
        (model, "full", [], "is not empty"),
        (model, "My model", ["--overwrite"], "is an input"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run(path, tmp_path / out, llama_cpp, "--to", "gguf", *words)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"no convert_hf_to_gguf\.py in it"):
        run(model, tmp_path / "out", tmp_path, "--to", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_template_that_cannot_be_translated_is_refused_before_the_conversion(model, llama_cpp, tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role + m.content|upper }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(SettingsError, match="--to ollama: the chat template"):
        run(model, tmp_path / "out", llama_cpp, "--to", "ollama")
    assert not (llama_cpp / "said.json").exists()
