"""Metrics against slow obvious ones, Google's ROUGE, and the bootstrap."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.estimates import Plain, estimate_mean, estimate_perplexity, estimate_ratio, subtract
from inference.metrics import count_calls, count_common, find_said, match_exactly, measure_rouge_l, split_words
from tests.conftest import needs


def say(content, *calls):
    calls = [{"type": "function", "function": {"name": name, "arguments": values}} for name, values in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def slow_common(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcd"), max_size=40))
def test_the_longest_common_subsequence(first, second):
    assert count_common(first, second) == slow_common(first, second)


@given(*[st.text(st.sampled_from("abZ9 .,'-\n"), max_size=60)] * 2)
def test_rouge_of_english_is_googles(answer, expected):
    needs("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    if split_words(answer) and split_words(expected):
        assert measure_rouge_l(answer, expected) == pytest.approx(scorer.score(expected, answer)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("我是小雀", "我是小猫", 0.75),
        ("我 是, 小雀。", "我是小雀", 1.0),
        ("LoRA是什么", "lora 是 什么", 1.0),
        ("ありがとう", "ありがたい", 0.6),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("<think>a b c</think>d", "d", 1.0),
    ],
)
def test_rouge_of_chinese_and_others(answer, expected, score):
    assert measure_rouge_l(answer, expected) == pytest.approx(score)


def test_reasoning_is_no_part_of_an_answer():
    assert find_said("<think>\nhm\n</think>\n\nyes ") == "yes"
    assert match_exactly(say("<think>\n\n</think>\n\nyes"), say("yes"))
    assert not match_exactly(say("<think> yes"), say("yes"))  # it never came to an answer


def test_calls_are_compared_as_json():
    wanted = say("", ("f", {"a": 1, "b": [True, "x"]}), ("g", {}))
    assert match_exactly(say("", ("g", {}), ("f", {"b": [True, "x"], "a": 1.0})), wanted)
    for other in ({"a": "1", "b": [True, "x"]}, {"a": 1, "b": [1, "x"]}, {"a": 1}):
        assert count_calls(say("", ("f", other), ("g", {})), wanted) == (2, 4)
    assert count_calls(say("f"), wanted) == (0, 2)
    assert count_calls(wanted, say("none")) == (0, 2)
    assert count_calls(say("", ("g", {}), ("g", {})), wanted) == (2, 4)  # said twice, right once


def draw(seed, num=200):
    """Summed losses of two models and the tokens of conversations whose lengths and losses belong together."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 60, num)
    hard = generator.gamma(2.0, 0.5, num) * (1 + tokens / 60)
    first, second = (tokens * (hard + generator.normal(0, 0.2, num) + shift) for shift in (0.0, 0.1))
    return first, second, tokens


@pytest.mark.parametrize("seed", range(3))
def test_standard_errors_are_those_of_the_bootstrap(seed):
    first, second, tokens = draw(seed)
    losses = [estimate_ratio(sums, tokens) for sums in (first, second)]
    assert losses[0].value == pytest.approx(first.sum() / tokens.sum())
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        rows = generator.integers(0, len(tokens), len(tokens))
        one, two = (sums[rows].sum() / tokens[rows].sum() for sums in (first, second))
        share = (second[rows] > first[rows]).mean()
        drawn.append([one, two - one, math.exp(one), math.exp(two) - math.exp(one), share])
    ours = [
        losses[0],
        subtract(losses[1], losses[0]),
        estimate_perplexity(losses[0]),
        subtract(*map(estimate_perplexity, losses[::-1])),
        estimate_mean(second > first),
    ]
    assert [each.standard_error for each in ours] == pytest.approx(np.std(drawn, axis=0), rel=0.1)


def test_a_paired_difference_is_surer_than_two_models_apart():
    first, second, tokens = draw(7)
    one, two = (estimate_ratio(sums, tokens) for sums in (first, second))
    assert subtract(two, one).standard_error < 0.5 * math.hypot(one.standard_error, two.standard_error)


def test_a_mean_has_the_usual_standard_error():
    values = [random.Random(3).random() for _ in range(9)]
    mean = estimate_mean(values)
    assert mean.standard_error == pytest.approx(np.std(values, ddof=1) / 3)
    assert math.isnan(estimate_mean([1.0]).standard_error)
    assert math.isnan(subtract(Plain(1.0, 0.1), Plain(0.5, 0.1)).standard_error)
    assert math.isnan(estimate_ratio([0], [0]).value)
