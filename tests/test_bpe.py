"""tiktoken in place of the tokenizer: the same ids, or not at all."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_utils import dataset
from data_utils.bpe import ByteLevelBPE, Differs
from data_utils.dataset import load_rows
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.templates import load_template

TEXT = st.text(max_size=30) | st.lists(
    st.sampled_from(
        ["a", " ", "\n", "the", "'s", "Ünï", "中文", "한국", "🙂", "12", "\u017f", "e\u0301", "\t", "</think>"]
    ),
    max_size=12,
).map("".join)


def twin_and_fast(template):
    encoder = template.encoder
    fast = encoder._byte_level.build(encoder._twin, encoder._never_written)
    assert fast is not None
    return encoder, fast


@pytest.fixture(scope="module")
def real(real_tokenizer_path):
    return twin_and_fast(ChatTemplate(load_tokenizer(str(real_tokenizer_path))))


@pytest.fixture(scope="module")
def small():
    return twin_and_fast(load_template("qwen3"))


@pytest.mark.parametrize("which", ["small", "real"])
def test_ids_are_the_tokenizers(request, which):
    encoder, fast = request.getfixturevalue(which)
    taken = []

    @given(TEXT)
    @settings(max_examples=500, deadline=None)
    def check(text):
        swapped = encoder.swap(encoder.escape(text)) + encoder.swap("<|im_end|>")
        if fast.takes(swapped):
            taken.append(text)
            assert [fast.encode(swapped)] == encoder._encode_plainly([swapped])

    check()
    assert len(taken) > 50


def test_texts_that_libraries_may_read_differently_are_left_to_the_tokenizer(small):
    _, fast = small
    for text in ("plain", "Ünï", "中文，好", "ひらがな", "한국어", "привет", "🙂", "“x” – …"):
        assert fast.takes(text), text
    for text in ("\u017f", "e\u0301", "\u212a", "\U00016d40", "\u1e9e\u0323", "ﬁ"):
        assert not fast.takes(text), text


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
    assert ByteLevelBPE.find(plain) is not None
    for change in (
        {"normalizer": normalizers.NFKC()},
        {"use_regex": True},
        {"behavior": "removed"},
        {"model": models.Unigram([("a", 0.0)], unk_id=0)},
        {"model": models.BPE(byte_fallback=True)},
    ):
        changed = state(**change)
        changed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": " "}
        assert ByteLevelBPE.find(changed) is None, change


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


def test_a_set_that_is_encoded_in_other_processes_is_the_same(checkpoints, many, monkeypatch):
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    assert template.encoder.can_be_fast
    fast = load_rows([many], template)
    template.encoder.can_be_fast = False
    threaded = load_rows([many], template)
    monkeypatch.setattr(dataset, "_POOL_FROM", 10**9)
    assert fast[1] == threaded[1] == load_rows([many], template)[1]


def test_a_difference_sends_everything_back_to_the_tokenizer(checkpoints, many, monkeypatch):
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    expected = load_rows([many], template)[1]
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    wrong = ByteLevelBPE.build

    def build(self, tokenizer, never_written):
        made = wrong(self, tokenizer, never_written)
        encode = made.encode
        made.encode = lambda text: encode(text)[:-1]
        return made

    monkeypatch.setattr(ByteLevelBPE, "build", build)
    with pytest.raises(Differs):
        template.encoder.encode_batch_fast(["some text"])
    template = ChatTemplate(load_tokenizer(str(checkpoints["untied"])))
    assert load_rows([many], template)[1] == expected and not template.encoder.can_be_fast
