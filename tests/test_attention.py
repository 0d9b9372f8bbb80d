"""Packed rows never see each other; models that cannot keep them apart are padded."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tests.conftest import build_model
from tuning.model import attention, packing, recurrent
from tuning.model.attention import NAME, attend
from tuning.model.loading import load_model
from tuning.model.packing import describe_rotary_switch, enable_packing
from tuning.model.training_model import TrainingModel, enable_gradient_checkpointing

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
HYBRID = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)  # fmt: skip
EAGER = dict(attn_implementation="eager")  # as load_model takes it for capped scores
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def make(config_class, model_class, **changes):
    torch.manual_seed(0)
    return TrainingModel(model_class(config_class(**{**SMALL, **changes})).eval())


def pack(lengths):
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "lengths": lengths,
        "row_starts": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
    }


PACKABLE = {
    "qwen2": lambda: make(Qwen2Config, Qwen2ForCausalLM),
    "qwen3-moe": lambda: make(Qwen3MoeConfig, Qwen3MoeForCausalLM, head_dim=8, **EXPERTS),
    "llama": lambda: make(LlamaConfig, LlamaForCausalLM),
    "phi3": lambda: make(Phi3Config, Phi3ForCausalLM),
    "mistral, window of 100": lambda: make(MistralConfig, MistralForCausalLM, sliding_window=100),
    "gemma3, window of 100": lambda: make(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=8, sliding_window=100),
    "mistral, window of 6": lambda: make(MistralConfig, MistralForCausalLM, sliding_window=6),
    "gemma3, window of 6": lambda: make(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=8, sliding_window=6),
    "qwen2, window of 6": lambda: make(
        Qwen2Config, Qwen2ForCausalLM, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "gemma2, capped scores": lambda: make(
        Gemma2Config, Gemma2ForCausalLM, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, **EAGER
    ),
    "gpt-oss, sinks and a window of 6": lambda: make(
        GptOssConfig, GptOssForCausalLM, head_dim=8, sliding_window=6, num_local_experts=4
    ),
    "qwen3-next": lambda: make(
        Qwen3NextConfig, Qwen3NextForCausalLM, head_dim=8, num_hidden_layers=4, **HYBRID, **EXPERTS
    ),
    "qwen3.5": lambda: make(Qwen3_5TextConfig, Qwen3_5ForCausalLM, head_dim=8, num_hidden_layers=4, **HYBRID),
    "gpt2": lambda: TrainingModel(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()),
}


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_rows_give_the_hidden_states_and_gradients_of_rows_alone(name):
    model = PACKABLE[name]()
    lengths = [5, 1, 17, 30]
    rows = [torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    alone = torch.cat([model.hidden_states(row[None]) for row in rows], 1)
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    (alone * direction).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert enable_packing(model, max_length=64, dtype=torch.float32) is None
    packed = model.hidden_states(torch.cat(rows)[None], **pack(lengths))
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    (packed * direction).sum().backward()
    for key, gradient in expected.items():
        difference = (dict(model.named_parameters())[key].grad - gradient).norm()
        assert difference <= 1e-4 * gradient.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["qwen2", "qwen3.5", "gpt-oss, sinks and a window of 6"])
def test_processes_that_did_not_try_pack_likewise(name, monkeypatch):
    model = PACKABLE[name]()
    monkeypatch.setattr(packing, "on_rank_0", lambda _: None)  # what rank 0 found, as the others get it
    lengths = [5, 11]
    rows = [torch.arange(3, 3 + length) for length in lengths]
    with torch.no_grad():
        alone = torch.cat([model.hidden_states(row[None]) for row in rows], 1)
        assert enable_packing(model, max_length=64, dtype=torch.float32) is None
        packed = model.hidden_states(torch.cat(rows)[None], **pack(lengths))
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


def drop_the_window(model):
    """Its attention no longer says how far back it reaches, and its mask still does."""
    for layer in model.causal_lm.model.layers:
        forward = layer.self_attn.forward

        def silent(*args, forward=forward, module=layer.self_attn, **options):
            window, module.sliding_window = module.sliding_window, None
            try:
                return forward(*args, **options)
            finally:
                module.sliding_window = window

        layer.self_attn.forward = silent
    return model


PADDED = {
    "a window that only the mask knows": (
        lambda: drop_the_window(make(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=8, sliding_window=40)),
        "its logits differ",
    ),
    "chunks": (
        lambda: make(LlamaConfig, LlamaForCausalLM, layer_types=["chunked_attention"] * 2, attention_chunk_size=40),
        "reaches back 40 tokens",
    ),
    "linear attention that is not known": (
        lambda: make(Qwen3NextConfig, Qwen3NextForCausalLM, head_dim=8, num_hidden_layers=4, **EXPERTS, unknown=True),
        "layers of linear_attention",
    ),
    "state space": (lambda: make(FalconMambaConfig, FalconMambaForCausalLM, state_size=4), "linear_attention"),
}


@pytest.mark.parametrize("name", PADDED)
def test_models_that_cannot_keep_rows_apart_are_left_as_they_were(name, monkeypatch):
    build, reason = PADDED[name]
    if "not known" in name:
        monkeypatch.setattr(recurrent, "_KIND", "SomethingElse")
    model = build()
    before = model.causal_lm.config._attn_implementation
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = model.causal_lm(input_ids=ids).logits
        obstacle = enable_packing(model, max_length=64, dtype=torch.float32)
        assert obstacle is not None and reason in obstacle
        assert model.causal_lm.config._attn_implementation == before
        assert torch.equal(model.causal_lm(input_ids=ids).logits, expected)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_that_drops_what_it_does_not_know_is_padded(tokenizer, dtype):
    model = TrainingModel(build_model(tokenizer, tied=False).eval())
    forward = model.causal_lm.model.forward
    model.causal_lm.model.forward = lambda input_ids, use_cache, **_: forward(input_ids=input_ids, use_cache=use_cache)
    obstacle = enable_packing(model, max_length=64, dtype=dtype)
    assert obstacle is not None and "a row changes the logits of the next" in obstacle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weak_influence_of_a_row_on_the_next_is_found(tokenizer, dtype):
    model = TrainingModel(build_model(tokenizer, tied=False).eval())

    def look_back(_module, _inputs, output):  # as a short convolution would
        return output + 0.02 * output.roll(1, 1)

    model.causal_lm.model.layers[0].mlp.register_forward_hook(look_back)
    obstacle = enable_packing(model, max_length=64, dtype=dtype)
    assert obstacle is not None and "a row changes the logits of the next" in obstacle


def test_positions_that_do_not_start_anew_are_found(tokenizer):
    model = TrainingModel(build_model(tokenizer, tied=False).eval())
    rotary = model.causal_lm.model.rotary_emb.forward
    model.causal_lm.model.rotary_emb.forward = lambda x, ids: rotary(x, torch.arange(ids.shape[1])[None] ** 2 / 4)
    obstacle = enable_packing(model, max_length=64, dtype=torch.float32)
    assert obstacle is not None and "its logits differ" in obstacle


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AttributeError("no such thing"), "it does not take packed rows (no such thing)"),
        (AssertionError(), "it does not take packed rows (AssertionError)"),
        (NotImplementedError(), "something in it is not implemented"),
    ],
)
def test_whatever_breaks_in_the_trial_the_model_is_as_before(tokenizer, error, reason):
    model = TrainingModel(build_model(tokenizer, tied=False).eval())

    def break_down(_module, _inputs, options):
        if "packed_lengths" in options:
            raise error

    model.causal_lm.model.layers[1].register_forward_pre_hook(break_down, with_kwargs=True)
    assert enable_packing(model, max_length=64, dtype=torch.float32) == reason
    assert model.causal_lm.config._attn_implementation == "sdpa"


def test_rotary_embeddings_that_switch_with_the_longest_row_are_said():
    def config(**rope):
        return LlamaConfig(**SMALL, rope_parameters={"rope_theta": 1e4, **rope})

    assert describe_rotary_switch(config(rope_type="default"), 10_000) is None
    dynamic = config(rope_type="dynamic", factor=2.0)
    assert describe_rotary_switch(dynamic, 256) is None
    assert "beyond 256 tokens" in str(describe_rotary_switch(dynamic, 257))


def test_packing_survives_gradient_checkpointing(tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = TrainingModel(build_model(tokenizer, tied=False))
        assert enable_packing(model, max_length=64, dtype=torch.float32) is None
        model.train()
        if checkpointing:
            enable_gradient_checkpointing(model.causal_lm)
        hidden = model.hidden_states(torch.arange(24)[None], **pack([9, 15]))
        hidden.cumsum(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_packed_model_generates_and_saves_as_before(tokenizer, tmp_path):
    plain, packed = (build_model(tokenizer, tied=False).eval() for _ in range(2))
    assert enable_packing(TrainingModel(packed), max_length=64, dtype=torch.float32) is None
    # Two prompts, padded on the left: a mask is needed.
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), packed.generate(ids, **options))
    packed.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["gemma2, capped scores", "gpt-oss, sinks and a window of 6", "qwen3-next", "qwen3.5"])
def test_models_with_attention_of_their_own_generate_as_before(name):
    plain, packed = (PACKABLE[name]().causal_lm for _ in range(2))
    assert enable_packing(TrainingModel(packed), max_length=64, dtype=torch.float32) is None
    ids = torch.tensor([[0, 0, 5, 6, 7, 3, 4, 8, 9], [8, 9, 10, 11, 12, 1, 3, 4, 5]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **options), packed.generate(ids, **options))


def test_a_model_that_caps_scores_is_loaded_with_attention_that_does(tmp_path):
    """transformers 5.17 has sdpa for Gemma-2, which leaves the caps out."""
    model = PACKABLE["gemma2, capped scores"]().causal_lm
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32).eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
        for layer in loaded.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = loaded(ids).logits
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * largest and (uncapped - expected).abs().max() > 1e-3 * largest
    assert load_model(str(tmp_path), dtype=torch.float32, meta=True).config._attn_implementation == "eager"


class _Module(nn.Module):
    is_causal = True


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 23), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 99),
    st.sampled_from([None, 1, 2, 5, 16, 100]),
    st.sampled_from([None, 1.5]),
    st.booleans(),
    st.sampled_from([1, 4, 7, 256]),
)
def test_attention_within_rows_equals_a_mask_written_out(lengths, key_heads, seed, window, softcap, has_sinks, block):
    """Rows, windows, caps and sinks in one table of scores, in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    states = [
        torch.randn(1, heads, total, 8, generator=generator).requires_grad_() for heads in (4, key_heads, key_heads)
    ]
    sinks = torch.randn(4, generator=generator).requires_grad_() if has_sinks else None
    inputs = [*states, *([sinks] if has_sinks else [])]
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    seen = (row[:, None] == row[None]) & (distance >= 0) & (distance < (window or total))

    def write_out(query, key, value, sink=None):
        key, value = (each.repeat_interleave(4 // key_heads, 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sink is not None:
            scores = torch.cat([scores, sink.reshape(1, 4, 1, 1).expand(1, 4, total, 1)], -1)
        return (scores.softmax(-1)[..., :total] @ value).transpose(1, 2)

    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = write_out(*exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_QUERIES", block)
        actual, _ = attend(
            _Module(), *states, None, scaling=0.3, packed_lengths=lengths, sliding_window=window, softcap=softcap,
            s_aux=sinks,
        )  # fmt: skip
    assert torch.allclose(actual.double(), expected, atol=1e-5)
    direction = torch.randn(actual.shape, generator=generator)
    gradients = torch.autograd.grad((actual * direction).sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": torch.zeros(4)},
        {"is_causal": False},
        {"indices": torch.zeros(1)},
        {"mask": torch.zeros(1, 4, 10, 10)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_attention_would_ignore_it_refuses(options):
    states = torch.randn(1, 4, 10, 8)
    mask = options.pop("mask", None)
    with pytest.raises(NotImplementedError):
        attend(_Module(), states, states, states, mask, packed_lengths=[5, 5], **options)


def _varlen(window_size=None, is_causal=None, scale=None, enable_gqa=False):
    """What torch's kernel is meant to compute, for the arguments that its versions take."""

    def compute(query, key, value, starts, keys, longest, longest_key):
        assert torch.equal(starts, keys) and longest == longest_key == starts.diff().max()
        assert is_causal in (None, True) and (window_size is None or window_size[1] == 0)
        back = total if (total := len(query)) and window_size in (None, (-1, 0)) else window_size[0]
        distance = torch.arange(total)[:, None] - torch.arange(total)
        seen = (distance >= 0) & (distance <= back)
        rows = [
            F.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (query, key, value)),
                scale=scale, attn_mask=seen[: b - a, : b - a], enable_gqa=enable_gqa,
            )[0].transpose(0, 1)
            for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)
        ]  # fmt: skip
        return torch.cat(rows)

    return compute


def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    compute = _varlen(window_size=window_size, scale=scale, enable_gqa=enable_gqa)
    return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert key.shape == query.shape
    return _varlen(is_causal=is_causal)(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.mark.parametrize(
    ("kernel", "window"), [(newer, None), (newer, 3), (older, None)], ids=["torch 2.13", "a window", "torch 2.10"]
)
def test_the_kernel_is_called_as_its_version_takes_it(kernel, window, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=kernel))
    monkeypatch.setattr(attention, "_load_kernel", attention._load_kernel.__wrapped__)
    monkeypatch.setattr(attention, "_kernel_takes", lambda *_: True)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    options = {"scaling": 0.3, "packed_lengths": [5, 7], "sliding_window": window}
    by_kernel, _ = attend(_Module(), query, key, value, None, packed_starts=starts, **options)
    by_rows, _ = attend(_Module(), query, key, value, None, **options)
    assert torch.allclose(by_kernel, by_rows, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_equals_rows_alone_on_a_gpu():
    query, key, value = (
        torch.randn(1, heads, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    )
    starts = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    results = []
    for packed_starts in (starts, None):
        output, _ = attend(
            _Module(), query, key, value, None, packed_lengths=[100, 1, 199], packed_starts=packed_starts
        )
        results.append([output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))])
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() <= 1e-2 * other.float().norm()
