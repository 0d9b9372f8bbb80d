"""A GGUF file held against its checkpoint: what fits passes, and each thing that does not is found."""

import copy
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, normalizers, pre_tokenizers

from data_utils.tokenizer import load_tokenizer
from inference import gguf_file
from inference.pre_tokenizer import find_differences, find_pre_tokenizer
from tests.conftest import build_model, build_moe, needs
from tuning.errors import SettingsError

needs("gguf")
import gguf

NAMES = {  # of Qwen3's tensors in a GGUF file
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
    **{f"mlp.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
    **{f"mlp.experts.{each}_proj": f"ffn_{each}_exps" for each in ("gate", "up", "down")},
}


def name_tensor(name):
    block, _, rest = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[rest]}.weight" if block.isdigit() else f"{NAMES[name.removesuffix('.weight')]}.weight"


def write_gguf(path, checkpoint, tokenizer, *, kind="F32", architecture="qwen3", change=None, **fields):
    """Write a Qwen3 checkpoint as a GGUF file. change: of its tensors. fields: other values than the right ones."""
    values = {
        "chat_template": tokenizer.get_chat_template(),
        "eos": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "bos": False,
        "pre": "qwen2",
        "tokens": tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))),
    } | fields
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(values["pre"])
    num_rows = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    tokens = [*values["tokens"], *(f"[PAD{i}]" for i in range(len(values["tokens"]), num_rows))]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    writer.add_token_list(tokens)
    writer.add_token_types(values.get("types") or [3 if i in special else 1 for i in range(num_rows)])
    merges = [" ".join(pair) for pair in gguf_file.read_definition(tokenizer)["model"]["merges"]]
    writer.add_token_merges(values.get("merges", merges))
    writer.add_eos_token_id(values["eos"])
    if values["bos"] is not None:
        writer.add_add_bos_token(values["bos"])
    writer.add_chat_template(values["chat_template"])
    tensors = {name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    stacks = {}
    for name in sorted(tensors, key=lambda name: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", name)]):
        if match := re.search(r"\.experts\.\d+\.", name):
            stacks.setdefault(name.replace(match.group(), ".experts."), []).append(tensors.pop(name))
    tensors |= {name: torch.stack(parts) for name, parts in stacks.items()}
    if change:
        change(tensors)
    for name, tensor in tensors.items():
        own = getattr(gguf.GGMLQuantizationType, kind if tensor.ndim > 1 else "F32")
        writer.add_tensor(name_tensor(name), gguf.quants.quantize(tensor.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """(checkpoint, its tokenizer with a chat template)."""
    root = tmp_path_factory.mktemp("made") / "model"
    build_model(tokenizer, tied=False).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root, load_tokenizer(str(root))


def check(file, checkpoint, tokenizer):
    reader = gguf_file.open_file(file)
    stop_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    notes = gguf_file.check_tokenizer(reader, tokenizer, stop_ids=stop_ids, num_rows=len(tokenizer) + 8)
    assert notes == []
    return gguf_file.compare_tensors(reader, checkpoint)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_fits_passes(made, tmp_path, kind):
    compared = check(write_gguf(tmp_path / "m.gguf", *made, kind=kind), *made)
    assert len(compared.equal) == len(load_file(made[0] / "model.safetensors"))
    assert compared.describe() == [f"{len(compared.equal)} tensors are equal"]


def without_type(tokenizer):
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    return [1 if i == special else 3 for i in range(len(tokenizer) + 8)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat_template": "{{ messages }}"}, "another chat template"),
        ({"eos": 5}, "stops at token 5"),
        ({"bos": True}, "no token goes before prompts"),
        ({"bos": None}, "no token goes before prompts"),
        ({"pre": "gpt-2"}, "splits text as gpt-2, but the tokenizer does so as qwen2"),
        ({"merges": ["a b"]}, "merges other pieces"),
        ({"types": "without"}, "<|im_start|> is no control token"),
        ({"tokens": "swapped"}, "token 300 is"),
    ],
)
def test_what_does_not_fit_is_named(made, tmp_path, fields, message):
    _, tokenizer = made
    if "types" in fields:
        fields = {"types": without_type(tokenizer)}
    if "tokens" in fields:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        tokens[300], tokens[301] = tokens[301], tokens[300]
        fields = {"tokens": tokens}
    with pytest.raises(SettingsError, match=re.escape(message)):
        check(write_gguf(tmp_path / "m.gguf", *made, **fields), *made)


def scale(tensors, *, name="model.layers.1.mlp.down_proj.weight", by=1.001):
    tensors[name] = tensors[name] * by


def roll(tensors):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].roll(1, 0)


def forget(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight"]


def test_changed_numbers_are_found(made, tmp_path):
    with pytest.raises(SettingsError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has other numbers"):
        check(write_gguf(tmp_path / "m.gguf", *made, change=scale), *made)


def test_other_orders_and_what_is_lacking_are_told(made, tmp_path):
    compared = check(write_gguf(tmp_path / "m.gguf", *made, change=roll), *made)
    assert compared.reordered == ["model.layers.0.self_attn.q_proj.weight"]
    assert "1 but for the order of their rows" in compared.describe()[0]
    compared = check(write_gguf(tmp_path / "n.gguf", *made, change=forget), *made)
    assert compared.describe()[1:] == ["not compared: model.layers.0.mlp.up_proj.weight"]


def test_an_architecture_whose_numbers_are_changed_on_purpose_is_told(made, tmp_path):
    change = partial(scale, name="model.norm.weight", by=2.0)
    compared = check(write_gguf(tmp_path / "m.gguf", *made, architecture="gemma3", change=change), *made)
    assert compared.changed == ["model.norm.weight"]


def test_tied_matrices_and_experts_are_compared(tokenizer, tmp_path):
    for name, model in (("tied", build_model(tokenizer, tied=True)), ("moe", build_moe(tokenizer))):
        path = tmp_path / name
        model.save_pretrained(path)
        if name == "tied":  # as some checkpoints have them: the copy, too
            tensors = load_file(path / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(path)
        own = load_tokenizer(str(path))

        def drop_copy(tensors):
            tensors.pop("lm_head.weight")

        architecture, change = ("qwen3", drop_copy) if name == "tied" else ("qwen3moe", None)
        file = write_gguf(tmp_path / f"{name}.gguf", path, own, architecture=architecture, change=change)
        compared = gguf_file.compare_tensors(gguf_file.open_file(file), path)
        num_tensors = len(load_file(path / "model.safetensors")) - (name == "tied")
        assert (len(compared.equal), compared.absent) == (num_tensors, [])
        if name == "moe":
            reader = gguf_file.open_file(file)
            next(t for t in reader.tensors if "ffn_up_exps" in t.name).data[3] *= 2
            with pytest.raises(SettingsError, match=r"experts\.3\.up_proj"):
                gguf_file.compare_tensors(reader, path)


def test_ends_are_written_in_place(made, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", *made, eos=0, bos=True)
    gguf_file.set_ends(gguf_file.open_file(file), made[1].convert_tokens_to_ids("<|im_end|>"))
    check(file, *made)


def test_a_template_that_writes_eos_keeps_its_eos(made):
    tokenizer = copy.copy(made[1])
    stop_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert gguf_file.choose_eos(tokenizer, stop_id) == stop_id
    tokenizer.chat_template = tokenizer.chat_template + "{{ eos_token }}"
    assert gguf_file.choose_eos(tokenizer, stop_id) == tokenizer.eos_token_id != stop_id
    with pytest.raises(SettingsError, match="answers end with"):  # llama.cpp stops at <|im_end|>, but not at any token
        gguf_file.choose_eos(tokenizer, 300)


def test_a_second_stop_token_that_llama_cpp_does_not_know_is_told(made, tmp_path):
    _, tokenizer = made
    reader = gguf_file.open_file(write_gguf(tmp_path / "m.gguf", *made))
    stop_ids = [tokenizer.convert_tokens_to_ids("<|im_end|>"), 300]
    notes = gguf_file.check_tokenizer(reader, tokenizer, stop_ids=stop_ids, num_rows=len(tokenizer) + 8)
    assert "ends an answer in generation_config.json, too" in notes[0]


def test_pre_tokenizers_are_known_by_their_definition(tokenizer):
    assert find_pre_tokenizer(tokenizer) == "qwen2" and find_differences(tokenizer) == []
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.NFC()
    assert find_pre_tokenizer(other) == "qwen2" and "NFC" in find_differences(other)[0]
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert find_pre_tokenizer(other) is None
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_pre_tokenizer(other) == "gpt-2"
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert find_pre_tokenizer(other) is None
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<tool>", lstrip=True)])
    assert find_pre_tokenizer(other) == "qwen2" and "<tool> takes spaces" in find_differences(other)[0]
