"""inference.prove: the right server is proven; the base, another template, no stop and another model are not."""

import contextlib
import dataclasses
import http.server
import json
import math
import random
import shutil
import threading

import pytest
import torch

import commands.prove
import finetune
import inference.endpoint
import merge_lora
from commands.loading import load_answering
from commands.prove import write_messages
from inference import prove
from inference.chat_model import ChatModel
from inference.endpoint import Endpoint, Served
from inference.proof import Prover
from tests.conftest import run_python
from tests.serving import endless, serving
from tests.test_saved import write_result
from tests.tool_model import ANSWER, ASKED, CALL, CALLED, RESULT, TOOL, write_tool_model

TAUGHT = (("How far is the moon?", "Far."), ("你好吗？", "很好"), ("Who are you?", "Me"))


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """An adapter whose answers are not the base's, the same merged, and what else a server may hold by mistake."""
    root = tmp_path_factory.mktemp("prove")
    write_result(checkpoints["untied"], "lora", root / "lora")
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TAUGHT]
    (root / "train.json").write_text(json.dumps(rows))
    words = ["--model_name_or_path", checkpoints["untied"], "--data_path", root / "train.json", "--use_lora"]
    words += ["--output_dir", root / "tokens", "--per_device_train_batch_size", 3, "--max_steps", 60, "--lora_r", 32]
    words += ["--learning_rate", 2e-2, "--save_strategy", "no", "--model_max_length", 128, "--logging_steps", 60]
    finetune.main([str(word) for word in words])
    merge_lora.main([str(root / "tokens"), str(root / "merged")])
    shutil.copytree(root / "merged", root / "base")
    shutil.copyfile(checkpoints["untied"] / "model.safetensors", root / "base" / "model.safetensors")
    shutil.copytree(root / "merged", root / "template")
    template = (root / "merged" / "chat_template.jinja").read_text()
    assert "You are a helpful assistant." in template
    (root / "template" / "chat_template.jinja").write_text(template.replace("a helpful assistant", "a pirate"))
    endless(root / "merged", root / "endless")
    (root / "rows.json").write_text(json.dumps(rows[:2]))
    return root


def run(model, served, capsys, *words):
    words = [str(model), "--url", f"{served.url}/v1", "--max_new_tokens", "12", *map(str, words)]
    code = prove.main(words)
    return code, capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tokens", pytest.param("merged", marks=pytest.mark.slow)])
def test_the_right_server_is_proven(models, capsys, kind):
    with serving(models / kind) as served:
        code, shown = run(models / kind, served, capsys, "--data", models / "rows.json")
    assert code == 0 and shown.endswith("proven: it answers as the trained model\n"), shown
    assert "2 rows, 7 fixed prompts" in shown and "prompts compared: 9 by ids" in shown
    assert (
        "answers as trained: 9 of 9, token by token; " in shown
        and "log probabilities: differ by" in shown
        and "warning" not in shown
    )
    assert ("the base alone would have answered" in shown) == (kind != "merged")


@pytest.mark.slow
def test_an_adapter_is_proven_by_its_merged_model(models, capsys):
    with serving(models / "merged") as served:
        assert run(models / "tokens", served, capsys)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("served_kind", "local", "reason"),
    [
        ("base", "tokens", "the adapter is not applied"),
        ("base", "merged", "another model"),
        ("template", "merged", "another chat template"),
        ("endless", "merged", "it does not stop at <|im_end|>"),
        ("lora", "merged", ""),
    ],
)
@pytest.mark.parametrize("tells", ["all", "text alone"])
def test_another_model_template_or_stop_is_named(models, capsys, monkeypatch, served_kind, local, reason, tells):
    if tells == "text alone":  # Ollama, say
        read = inference.endpoint.read_response
        monkeypatch.setattr(
            inference.endpoint,
            "read_response",
            lambda response: dataclasses.replace(read(response), ids=None, prompt_ids=None, logprobs=None),
        )
    with serving(models / served_kind) as served:
        code, shown = run(models / local, served, capsys, "--num", 0)
    assert code == 1 and "not proven" in shown and reason in shown, shown


@pytest.mark.slow
def test_an_endpoint_that_refuses_what_is_not_openais(models, capsys, monkeypatch):
    """Then it is asked for less, and the text decides."""
    import inference.chat_handler
    from inference.requests import RequestError, read_request

    def refuse(body, name):
        for field in ("return_token_ids", "logprobs"):
            if field in body:
                raise RequestError(f"{field}: unknown")
        return read_request(body, name)

    monkeypatch.setattr(inference.chat_handler, "read_request", refuse)
    with serving(models / "merged") as served:
        code, shown = run(models / "tokens", served, capsys, "--num", 0)
    assert code == 0 and "prompts compared: 7 by their number" in shown and "log probabilities" not in shown


@pytest.mark.slow
def test_answers_that_do_not_end_prove_no_stop(models, capsys):
    with serving(models / "merged") as served:
        code, shown = run(models / "merged", served, capsys, "--num", 0, "--max_new_tokens", 1)
    assert code == 1 and "so the stop was not compared" in shown


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_not_proven(models, checkpoints, capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "lora", tmp_path / "zero")
    for name in ("manifest.json", "run.json"):
        (tmp_path / "zero" / name).unlink(missing_ok=True)
    settings = json.loads((tmp_path / "zero" / "generation_config.json").read_text())
    stops = {"eos_token_id": list(range(300))}  # an answer of an untrained model that ends
    (tmp_path / "zero" / "generation_config.json").write_text(json.dumps(settings | stops))
    file = tmp_path / "zero" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    with serving(tmp_path / "zero") as served:
        code, shown = run(tmp_path / "zero", served, capsys, "--num", 0)
    assert code == 1 and "the base without the adapter would have answered the same" in shown


@pytest.mark.slow
def test_without_adapter_is_the_base(models, checkpoints):
    """Rows, LoRA and all; and afterwards the adapter is back, to the bit."""
    parse = prove.build_parser().parse_args
    ids = torch.tensor([random.Random(0).choices(range(500), k=30)])
    for kind in ("tokens", "lora"):
        loaded = load_answering(parse([str(models / kind), "--url", "http://x/v1"]))
        base = load_answering(parse([str(models / "base"), "--url", "http://x/v1"]))
        with torch.no_grad():
            before = loaded.model(ids).logits
            with loaded.kept.without_adapter():
                inside = loaded.model(ids).logits
            assert torch.equal(loaded.model(ids).logits, before)
            expected = base.model(ids).logits
        assert torch.allclose(inside, expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-3)


@pytest.mark.slow
def test_rows_with_tools(tokenizer, tmp_path, capsys):
    model = write_tool_model(tokenizer, tmp_path / "caller")
    answer = {"role": "assistant", "content": ANSWER}
    rows = [
        {"messages": [ASKED, CALLED], "tools": [TOOL]},
        {"messages": [ASKED, CALLED, RESULT, answer], "tools": [TOOL]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serving(model) as served:
        code, shown = run(model, served, capsys, "--data", tmp_path / "rows.jsonl", "--max_new_tokens", 60)
    assert code == 0 and "2 rows" in shown, shown
    wire = write_messages([ASKED, CALLED, RESULT])
    assert wire[1]["tool_calls"][0]["function"]["arguments"] == json.dumps(CALL["arguments"], ensure_ascii=False)
    assert wire[1]["tool_calls"][0]["id"] == wire[2]["tool_call_id"]


@pytest.mark.slow
def test_mistakes_are_one_line(models):
    for words, message in (
        (["--url", "x"], "--url x: expected http://HOST:PORT/v1"),
        (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1: Connection error."),
    ):
        done = run_python("-m", "inference.prove", models / "merged", *words, check=False)
        assert (done.returncode, done.stderr) == (2, f"error: {message}\n")
    with serving(models / "merged", "--api_key", "right") as served:
        with pytest.raises(ValueError, match="wrong API key"):
            prove.main([str(models / "merged"), "--url", f"{served.url}/v1", "--api_key", "wrong"])
        with pytest.raises(ValueError, match="serves merged, not other"):
            prove.main(
                [str(models / "merged"), "--url", f"{served.url}/v1", "--api_key", "right", "--served_name", "other"]
            )


def test_rows_of_the_run(models, tmp_path, capsys):
    """Its evaluation data, else its data; relative to where it ran."""
    shutil.copytree(models / "merged", tmp_path / "run")
    (tmp_path / "data.json").write_text((models / "rows.json").read_text())
    args = prove.build_parser().parse_args([str(tmp_path / "run"), "--url", "http://x/v1"])
    args.named = args.model
    record = {"directory": str(tmp_path), "settings": {"data": {"data_path": ["data.json"], "eval_data_path": None}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert [row.asked.messages[0]["content"] for row in commands.prove.read_rows(args)] == [
        "How far is the moon?",
        "你好吗？",
    ]
    args.num = 1
    assert len(commands.prove.read_rows(args)) == 1
    record["settings"]["data"]["eval_data_path"] = ["data.json*2.5"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert len(commands.prove.read_rows(args)) == 1
    record["settings"]["data"]["eval_data_path"] = ["gone.json"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert commands.prove.read_rows(args) == [] and "no rows of gone.json" in capsys.readouterr().out
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json: is not finetune\.py's"):
        commands.prove.read_rows(args)


def test_what_an_endpoint_leaves_open_is_not_proven(models):
    """The right answer without its end, cut, with ids of another vocabulary, log probabilities that are none."""
    loaded = load_answering(prove.build_parser().parse_args([str(models / "merged"), "--url", "http://x/v1"]))
    prover = Prover(ChatModel(loaded.model, loaded.tokenizer, kept=loaded.kept), None, 0.1)
    expected = prover.expect([{"role": "user", "content": "How far is the moon?"}], 12)
    assert expected.stopped and len(expected.text) > 1
    right = Served(expected.text, "stop")
    with_ids = dataclasses.replace(right, ids=expected.ids)
    assert prover.compare(expected, right).difference is None
    assert prover.compare(expected, with_ids).difference is None
    for served, reason in (
        (dataclasses.replace(right, finish_reason=""), "does not say that the answer ended"),
        (dataclasses.replace(right, finish_reason="length"), "it does not stop at"),
        (dataclasses.replace(right, text=expected.text[:1], finish_reason="length"), "is cut after"),
        (dataclasses.replace(with_ids, ids=[2**31 - 1]), "is not in the vocabulary"),
        (dataclasses.replace(with_ids, logprobs=[("", math.nan)] * len(expected.ids)), "log probabilities differ"),
        (dataclasses.replace(right, text="no " * 10_000), "below the likeliest"),  # and not all of it is computed
    ):
        assert reason in (prover.compare(expected, served).difference or ""), (served, reason)


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: "<html>",
        lambda answer: [1],
        lambda answer: {},
        lambda answer: {**answer, "choices": []},
        lambda answer: {**answer, "choices": [5]},
        lambda answer: {**answer, "usage": [1]},
        lambda answer: {**answer, "prompt_token_ids": [-1]},
        *(
            lambda answer, part=part: {**answer, "choices": [{**answer["choices"][0], **part}]}
            for part in (
                {"message": None},
                {"message": {"role": "assistant", "content": 5}},
                {"message": {"role": "assistant", "content": "\ud800"}},
                {"message": {"role": "assistant", "content": "", "tool_calls": [1]}},
                {"message": {"role": "assistant", "content": "", "reasoning_content": {}, "reasoning": 1}},
                {"logprobs": {"content": [1]}},
                {"logprobs": {"content": [{"token": "a", "logprob": None}]}},
                {"token_ids": ["a"]},
                {"token_ids": [10**30]},
                {"token_ids": 5},
            )
        ),
    ],
)
def test_what_is_no_answer_is_one_line(change):
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    answer = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 5}}
    refused = pytest.raises(ValueError, match="does not answer as OpenAI's API does")
    with _answering({"data": [{"id": "m"}]}, change(answer)) as url, refused:
        Endpoint(url, "none", None).ask([{"role": "user", "content": "x"}], 4)
    with _answering({"data": [{"id": "m"}]}, answer) as url:
        assert Endpoint(url, "none", None).ask([{"role": "user", "content": "x"}], 4).text == "hello"


@pytest.mark.parametrize("models_answer", ["<html>", [1], {"data": None}])
def test_an_address_of_something_else_is_one_line(models_answer):
    with _answering(models_answer, {}) as url, pytest.raises(ValueError, match="is it the address up to and with /v1"):
        Endpoint(url, "none", None)


@contextlib.contextmanager
def _answering(models_answer, chat_answer):
    """A server of two fixed answers. Yields: its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(models_answer)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self._send(chat_answer)

        def _send(self, answer):
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if isinstance(answer, str) else "application/json")
            self.end_headers()
            self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_lines_of_a_text_file_are_asked(models, tmp_path):
    (tmp_path / "lines.txt").write_text("One?\nTwo?\n")
    words = [str(models / "merged"), "--url", "http://127.0.0.1:9/v1", "--data", str(tmp_path / "lines.txt")]
    rows = commands.prove.read_rows(prove.build_parser().parse_args(words))
    assert [row.asked.messages[0]["content"] for row in rows] == ["One?", "Two?"]
    with pytest.raises(ValueError, match="--data: has no effect with --num 0"):
        prove.main([*words, "--num", "0"])
