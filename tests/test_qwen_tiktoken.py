"""The vocabulary of the original Qwen: the same ids, or one line."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_utils.qwen_tiktoken import SPECIAL_TOKENS, read_ranks
from data_utils.sources import DataError
from data_utils.tokenizer import load_tokenizer
from tests.conftest import SHARED, needs
from tests.original_checkpoint import (
    CONFIG,
    convert_to,
    random_state,
    write_original,
)


def test_real_vocabulary_gives_the_golden_ids(tmp_path):
    if not (SHARED / "qwen_tokenizer").is_dir():
        pytest.skip("the real Qwen vocabulary is not beside the project")
    shutil.copy(SHARED / "qwen_tokenizer" / "qwen.tiktoken", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151643, 151851))
    for case in json.loads((SHARED / "golden" / "qwen_v1_tokens.json").read_text()):
        assert tokenizer(case["text"])["input_ids"] == case["ids_special"]
        assert tokenizer(case["text"], split_special_tokens=True)["input_ids"] == case["ids_plain"]
    theirs = json.loads((SHARED / "qwen_tokenizer" / "hf" / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == theirs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.text(alphabet="The license's 你 é\n\t 12!|<>_imstart", max_size=60))
def test_ids_are_tiktokens(small_tokenizer, text):
    import unicodedata

    ours, theirs = small_tokenizer
    normal = unicodedata.normalize("NFC", text)
    if normal.isprintable():  # tables of new characters differ between the libraries
        assert ours(text)["input_ids"] == theirs.encode(normal, allowed_special="all")
        plain = ours(text, split_special_tokens=True)["input_ids"]
        assert plain == theirs.encode_ordinary(normal)
        assert ours.decode(plain) == normal


@pytest.fixture(scope="session")
def small_tokenizer(tokenizer, tmp_path_factory):
    needs("tiktoken")
    import tiktoken

    from data_utils.qwen_tiktoken import _SPLIT

    directory = write_original(tmp_path_factory.mktemp("small"), tokenizer, random_state())
    ranks = read_ranks(directory / "qwen.tiktoken")
    special = {text: len(ranks) + number for number, text in enumerate(SPECIAL_TOKENS)}
    return load_tokenizer(str(directory)), tiktoken.Encoding(
        "qwen", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:300] + lines[301:], r"qwen\.tiktoken:301: rank 301, where 300 comes next"),
        (lambda lines: [*lines[:7], b"!!!! 7", *lines[8:]], r"qwen\.tiktoken:8: the token is not base64"),
        (lambda lines: [*lines[:9], b"version https://git-lfs", *lines], r"qwen\.tiktoken:10: expected a token"),
        (lambda lines: [*lines[:5], lines[4][:-1] + b"5", *lines[6:]], r"qwen\.tiktoken:6: the token of rank 4 again"),
        (lambda lines: [*lines[:-1], b"MTIzNDU2Nzg5 799"], r"rank 799 is not made up of two earlier ones"),
        (lambda lines: lines[:100], r"no token for the byte"),
        (lambda lines: lines[:-1], r"<\|endoftext\|> would be token 799, and generation_config\.json says 800"),
        (lambda lines: [*lines, b"ICAgICAgICA= 800"], r"would be token 801|not made up|again"),
    ],
)
def test_a_damaged_vocabulary_is_one_line(original, tmp_path, change, message):
    source = original(random_state())
    file = source / "qwen.tiktoken"
    file.write_bytes(b"\n".join(change(file.read_bytes().splitlines())))
    with pytest.raises(DataError, match=message) as error:
        convert_to(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_size_is_refused(original):
    source = original(random_state())
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 151936}))
    with pytest.raises(DataError, match=r"1,008 tokens with the special ones, and config.json says vocab_size 151,936"):
        load_tokenizer(str(source))
