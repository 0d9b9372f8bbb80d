"""tiktoken in place of the tokenizer: the same ids, or not at all."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_utils.dataset import load_rows
from data_utils.safe_encoder import TiktokenDiffers
from data_utils.template import ChatTemplate
from data_utils.tiktoken_encoder import TiktokenEncoder, find_pattern
from data_utils.tokenizer import load_tokenizer
from tests.templates import load_template

TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from(
        ["a", " ", "\n", "the", "'s", "Ünï", "中文", "한국", "🙂", "12", "\u017f", "e\u0301", "\t", "</think>"]
    ),
    max_size=12,
).map("".join)


def both(template):
    """The tokenizer's encoder, and tiktoken."""
    encoder = template.encoder
    with encoder.use_tiktoken():
        fast = encoder._tiktoken
    assert fast is not None and encoder._tiktoken is None
    return encoder, fast


@pytest.fixture(scope="module")
def real(real_tokenizer_path):
    return both(ChatTemplate(load_tokenizer(str(real_tokenizer_path))))


@pytest.fixture(scope="module")
def small():
    return both(load_template("qwen3"))


@pytest.mark.parametrize("which", ["small", "real"])
def test_ids_are_the_tokenizers(request, which):
    encoder, fast = request.getfixturevalue(which)
    taken = []

    @given(TEXT)
    @settings(max_examples=500)
    def check(text):
        if fast.is_common(text):
            taken.append(text)
            assert fast.encode(text) == encoder._encode_whole(encoder.escape(text))

    check()
    assert len(taken) > 50


def test_texts_that_libraries_may_read_differently_are_left_to_the_tokenizer(small):
    _, fast = small
    for text in ("plain", "Ünï", "中文，好", "ひらがな", "한국어", "привет", "🙂", "“x” – …"):
        assert fast.is_common(text), text
    for text in ("\u017f", "e\u0301", "\u212a", "\U00016d40", "\u1e9e\u0323", "ﬁ"):
        assert not fast.is_common(text), text


def test_a_tokenizer_that_is_more_than_byte_level_bpe_is_left_alone():
    def state(**changes):
        tokenizer = Tokenizer(changes.pop("model", models.BPE()))
        tokenizer.normalizer = changes.pop("normalizer", normalizers.NFC())
        split = pre_tokenizers.Split(" ", changes.pop("behavior", "isolated"))
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=changes.pop("use_regex", False))]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return json.loads(tokenizer.to_str())

    plain = state()
    plain["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": " "}
    assert find_pattern(plain) is not None
    for change in (
        {"normalizer": normalizers.NFKC()},
        {"use_regex": True},
        {"behavior": "removed"},
        {"model": models.Unigram([("a", 0.0)], unk_id=0)},
        {"model": models.BPE(byte_fallback=True)},
    ):
        changed = state(**change)
        changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": " "}
        assert find_pattern(changed) is None, change


@pytest.fixture
def many(write_json):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}? 中 {i}"},
                {"role": "assistant", "content": f"No. {i}"},
            ]
        }
        for i in range(1500)
    ]
    return write_json("\n".join(map(json.dumps, rows)), "many.jsonl")


def build_off_by_one(tokenizer, state, control, build=TiktokenEncoder.build):
    made = build(tokenizer, state, control)
    encode = made.encode
    made.encode = lambda text: encode(text)[:-1]
    return made


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_sends_everything_back_to_the_tokenizer(checkpoints, many, monkeypatch, workers):
    monkeypatch.setattr("data_utils.dataset.count_workers", lambda: workers)
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    expected = load_rows([many], template)[1]
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    monkeypatch.setattr(TiktokenEncoder, "build", build_off_by_one)
    with template.encoder.use_tiktoken(), pytest.raises(TiktokenDiffers):
        template.encoder.encode("some text")
    assert load_rows([many], template)[1] == expected


def test_a_set_has_the_same_rows_with_and_without_tiktoken(checkpoints, many, monkeypatch):
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    with template.encoder.use_tiktoken():
        assert template.encoder._tiktoken is not None
    expected = load_rows([many], template)[1]
    monkeypatch.setattr(TiktokenEncoder, "build", lambda *_: None)
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    assert load_rows([many], template)[1] == expected
