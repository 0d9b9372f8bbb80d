"""python -m tuning.report: the page, the list of rows, the server, and what they say of mistakes."""

import contextlib
import hashlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from commands.report_page import charts, server
from commands.report_page.charts import Curve, Level, draw_chart
from commands.report_page.data_rows import read_rows
from commands.report_page.markup import tag
from commands.report_page.page import build_page
from commands.report_page.runs import read_run
from data_utils.sources import printable
from data_utils.template import ChatTemplate
from data_utils.tokenizer import load_tokenizer
from tests.browser import chromium, read_requests
from tests.conftest import CONVERSATIONS, ROOT, wait_until
from tests.test_chaos import words
from tests.test_row_losses import write as write_rows

SCRIPT = "tuning/report.py"


def write_run(directory, *, texts=None, rows=3, status="finished", lines=()):
    """A run as finetune.py leaves it, with a text of choice wherever one may come from data, settings or models."""
    say = (texts or {}).get
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "data.jsonl"
    asked = [(f"{say('question', 'Q')} {n}", f"{say('said', 'A')} {n}") for n in range(rows)]
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in asked), encoding="utf-8")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    account = {"files": [{"path": str(data), "sha256": digest, "conversations": rows}], "conversations": rows}
    account |= {"problems": [say("problem", "a problem")], "num_problems": 1, "unread": {say("key", "key"): 2}}
    record = {
        "program": "finetune.py",
        "status": status,
        "command": say("command", "python finetune.py"),
        "directory": str(directory),
        "versions": {"torch": say("version", "2")},
        "git": {"commit": say("commit", "abc"), "dirty": True},
        "settings": {
            "model": {"model_name_or_path": say("model", "M")},
            "run": {say("setting", "learning_rate"): [say("value", 0.1)], "output_dir": str(directory)},
        },
        "data": account,
        "plan": {"memory": {"total": 2**30}, "layout": {"num_steps": 4}},
        "parameters": {"trainable": 10, "total": 1000},
        "wall_s": 12.5,
        "sessions": [{"began": "2026-01-02T03:04:05+00:00"}],
    }
    (directory / "run.json").write_text(json.dumps(record))
    metrics = [{"step": n, "loss": 4.0 / n, "learning_rate": 0.1, "peak_gib": 0.5, "tokens_per_s": 9} for n in (1, 2)]
    sample = {"prompt": say("prompt", "P"), "answer": say("answer", "R"), "ended_by": say("ended", "stop")}
    metrics += [{"step": 2, "eval_loss": 1.5}, {"step": 2, "samples": [sample]}, *lines]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    visits = [(n, epoch, 3.0 - epoch) for epoch in range(2) for n in range(rows)]
    ids = [say("id", "data") + f"-{n}" for n, *_ in visits]
    # The first row's text is found again, those of the others are not: their ids are others'.
    names = [f"data-{n}" if n == 0 else row_id for (n, *_), row_id in zip(visits, ids, strict=True)]
    places = [f"{data}:1" if n == 0 else say("place", "other.json") + f":{n}" for n, *_ in visits]
    write_rows(directory / "rows.parquet", visits, row_id=names, source=places)
    return directory


class Parsed(HTMLParser):
    """tags: (name, names of attributes) in order. text: all of it. values: of the attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.values, self.texts = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs]))
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)

    unknown_decl = handle_pi = handle_comment


def page_of(*directories, **options):
    return build_page([read_run(str(directory)) for directory in directories], **options)


# ---- everything that others wrote is text ----

PLACES = [
    *("question", "said", "problem", "key", "command", "version", "commit", "model", "setting", "value"),
    *("prompt", "answer", "ended", "id", "place"),
]
HOSTILE = st.one_of(
    st.sampled_from(
        [
            "<script>alert(1)</script>",
            "</script><img src=x onerror=alert(1)>",
            "</style></title></textarea></svg><b>",
            '" onload="alert(1)" x="',
            "' onmouseover='alert(1)",
            "<!-- ]]> <![CDATA[ <?x",
            "&lt;b&gt; &amp; &#60;i&#62; &lt",
            "<svg><script href='data:,alert(1)'/>",
            "javascript:alert(1)//`${alert(1)}`",
            "\u202e\u2028\ufffe\x00\x1b[31m\ud800",
            "{}{0}{tag} %s %(x)s",
        ]
    ),
    st.text(st.sampled_from("<>&\"'/=! -abc\n\t\r;`{}#x3\\\u202e\x07é字🙂\ufdd0"), min_size=1, max_size=25),
    st.text(min_size=1, max_size=25),
)


def escaped(text):
    return re.sub(r"[\ufdd0-\ufdef\ufffe\uffff]", lambda match: f"\\u{ord(match.group()):04x}", printable(text))


@settings(max_examples=25)
@given(st.fixed_dictionaries({place: HOSTILE for place in PLACES}))
@example(dict.fromkeys(PLACES, "<script>alert(1)</script>"))
def test_texts_never_become_markup(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("hostile")
    # A text that cannot be in a file of JSON or parquet, half a surrogate pair, comes by \\u in JSON alone.
    texts = {name: f"x{text}" for name, text in texts.items()}
    for name in ("question", "said", "id", "place"):
        texts[name] = texts[name].encode("utf-8", "replace").decode()
    plain = Parsed(page_of(write_run(root / "plain")))
    found = Parsed(page_of(write_run(root / "plain", texts=texts)))
    assert found.tags == plain.tags
    seen = "\0".join([*found.texts, *found.values]).replace("\n", "\\n")
    expected = {**texts, "value": json.dumps([texts["value"]], ensure_ascii=False)}
    for name, text in expected.items():
        assert escaped(text).replace("\n", "\\n") in seen, name


@given(HOSTILE)
def test_an_element_holds_its_texts(text):
    found = Parsed(tag("p", text, tag("b", text), title=text))
    assert found.tags == [("p", ["title"]), ("b", []), "/b", "/p"]
    assert "".join(found.texts) == escaped(text) * 2 and found.values == [escaped(text)]


def test_names_of_runs_are_text_too(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    page = page_of(write_run(tmp_path / "a"), write_run(tmp_path / name))
    assert "<img" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") > 5


def test_the_policy_allows_this_page_alone(tmp_path):
    page = page_of(write_run(tmp_path))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#x27;", "'")
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "connect-src" not in policy and "connect-src 'self'" in page_of(
        write_run(tmp_path, status="running"), refresh_s=5
    ).replace("&#x27;", "'")
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://|\sstyle=|\son\w+=", page)


# ---- what the page shows ----


def test_charts_place_their_points():
    chart = draw_chart("t", [Curve("one", [(0, 0.0), (10, 5.0)])], [Level("plan", 10.0)])
    line = re.search(r'polyline points="([^"]+)"', chart)[1]
    assert line == "56.0,206.0 450.0,108.0" and 'y1="10.0"' in chart and "one, step 10: 5" in chart
    assert draw_chart("t", [Curve("none", [])]) == ""
    assert "logarithmic" in draw_chart("t", [Curve("one", [(1, 1.0), (2, 100.0)])])
    assert "logarithmic" not in draw_chart("t", [Curve("one", [(1, 1.0), (2, 100.0)])], from_zero=True)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(-1e299, 1e299)), min_size=1, max_size=30), st.booleans())
def test_any_points_make_a_chart(points, from_zero):
    chart = draw_chart("t", [Curve("one", [(float(x), y) for x, y in points])], from_zero=from_zero)
    places = re.search(r'polyline points="([^"]+)"', chart)[1].replace(",", " ").split()
    assert np.isfinite([float(each) for each in places]).all()
    assert chart.count("<text") < 40


def test_long_curves_are_thinned_and_keep_their_ends():
    curve = charts._thin(Curve("one", [(n, 1.0) for n in range(100_001)]))
    assert len(curve.points) <= 402 and curve.points[0][0] == 0 and curve.points[-1][0] == 100_000


def test_runs_are_overlaid_and_their_differences_named(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", texts={"value": 0.5, "said": "other"})
    found = Parsed(page_of(one, two))
    text = "\n".join(found.texts)
    assert f"{one} evaluation" in text and f"{two} planned" in text
    differs = text[text.index("What differs") :]
    assert "learning_rate\n[0.1]\n[0.5]" in differs and "output_dir" not in differs.split("command")[0]
    assert "All settings are the same" in page_of(one, write_run(tmp_path / "three"))


def test_answers_that_stay_the_same_stand_once(tmp_path):
    said = [(2, "B"), (4, "B"), (6, "C"), (8, "B")]
    lines = [{"step": s, "samples": [{"prompt": "Who?", "answer": a, "ended_by": "stop"}]} for s, a in said]
    text = "\n".join(Parsed(page_of(write_run(tmp_path, lines=lines))).texts)
    assert "Who?\nsteps\nanswer\nended by\n2 – 4\nB\nstop\n6\nC\nstop\n8\nB\nstop" in text


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path, status="running")
    (run / "rows.parquet").unlink()
    (run / "metrics.jsonl").write_text("")
    page = page_of(run)
    assert "they are written with each checkpoint" in page and "<svg" not in page
    (run / "metrics.jsonl").unlink()
    (run / "run.json").write_text('{"program": "finetune.py", "status": "running"}')
    assert "running" in page_of(run)


def test_lines_that_are_still_being_written_or_damaged(tmp_path):
    run = write_run(tmp_path)
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "lo')
    found = read_run(str(run))
    assert (len(found.metrics), found.unread_lines) == (whole.count("\n"), 0)
    metrics.write_text('nonsense\n[1]\n{"step": 3, "loss": NaN}\n{"step": "x", "loss": 1}\n' + whole)
    found = read_run(str(run))
    assert found.unread_lines == 2 and found.points("loss") == [(1.0, 4.0), (2.0, 2.0)]
    assert "2 lines of metrics.jsonl could not be read" in page_of(run)


def test_data_that_has_changed_is_not_shown(tmp_path):
    run = write_run(tmp_path)
    place = (f"{run / 'data.jsonl'}:1", "data-0")
    assert read_rows(read_run(str(run)), [place]).texts(place) == ("Q 0", "A 0")
    with open(run / "data.jsonl", "a") as file:
        file.write('{"prompt": "new", "completion": "new"}\n')
    found = read_rows(read_run(str(run)), [place])
    assert found.texts(place) is None and "changed since the run" in found.notes[0]
    (run / "data.jsonl").unlink()
    assert "not here" in read_rows(read_run(str(run)), [place]).notes[0]


def test_rows_of_one_line_are_told_apart_by_their_ids(tmp_path):
    run = write_run(tmp_path)
    record = json.loads((run / "run.json").read_text())
    data = run / "data.json"
    data.write_text(json.dumps([{"prompt": f"Q{n}", "completion": f"A{n}"} for n in range(3)]))
    record["data"]["files"] = [{"path": f"{data}#3", "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}]
    (run / "run.json").write_text(json.dumps(record))
    places = [(f"{data}:1", "data-2"), (f"{data}:1", "data-1#2")]
    found = read_rows(read_run(str(run)), places)
    assert [found.texts(place) for place in places] == [("Q2", "A2"), ("Q1", "A1")]


# ---- rows of real conversations ----


@pytest.fixture(scope="module")
def examples(checkpoints, tmp_path_factory):
    """A run on the example conversations, with a tokenizer, and losses that are made up."""
    out = write_run(tmp_path_factory.mktemp("report") / "out")
    ChatTemplate(load_tokenizer(str(checkpoints["untied"]))).tokenizer.save_pretrained(out)
    conversations = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    record = json.loads((out / "run.json").read_text())
    digest = hashlib.sha256(CONVERSATIONS.read_bytes()).hexdigest()
    record["data"]["files"] = [{"path": str(CONVERSATIONS), "sha256": digest, "conversations": len(conversations)}]
    (out / "run.json").write_text(json.dumps(record))
    losses = np.random.default_rng(0).uniform(0.1, 4, (3, len(conversations)))
    visits = [(row, epoch, losses[epoch, row]) for epoch in range(3) for row in range(len(conversations))]
    ids, places = ([form(row) for row, *_ in visits] for form in (lambda n: conversations[n]["id"], _place_of))
    write_rows(out / "rows.parquet", visits, row_id=ids, source=places)
    return out


def _place_of(row):
    return f"{CONVERSATIONS}:{row + 2}"


def test_rows_as_they_are_trained(examples):
    page = page_of(examples)
    text = "\n".join(Parsed(page).texts)
    assert page.count("<section>") == 5 and '<span class="control">&lt;|im_start|&gt;</span>' in page
    assert "demo-00: " in text and f"{CONVERSATIONS}:2" in text and "I am Sparrow, a small model" in text


def test_rows_in_the_terminal(examples, run_script):
    code, stdout, stderr = run_script(SCRIPT, examples, "--rows", "--num", 5)
    lines = stdout.splitlines()
    assert code == 0 and lines[0] == "5 of 56 rows, by excess, after 3 epochs", stderr
    assert len(lines) == 11 and all(line.startswith(f"{CONVERSATIONS}:") for line in lines[1::2])
    assert all(re.match(r"    .+ -> .+", line) for line in lines[2::2])

    def rows(*more):
        return [json.loads(line) for line in run_script(SCRIPT, examples, "--rows", "--json", *more)[1].splitlines()]

    listed = rows("--num", 99)
    excess = [row["excess"] for row in listed]
    assert len(excess) == 56 and excess == sorted(excess, reverse=True)
    assert [row["row_id"] for row in listed[:5]] == [line.split("  ")[1] for line in lines[1::2]]
    last = [row["losses"]["2"] for row in rows("--sort", "loss")]
    assert len(last) == 20 and last == sorted(last, reverse=True)
    assert list(rows("--epoch", 0, "--num", 1)[0]["losses"]) == ["0"]
    assert all("spiked" in row["verdicts"] for row in rows("--verdict", "spiked"))
    some = run_script(SCRIPT, examples, "--rows", "--filter", "who ARE you")[1]
    assert "Who are you? -> I am Sparrow" in some and 1 < len(some.splitlines()) < 30
    assert run_script(SCRIPT, examples, "--rows", "--verdict", "not finite")[1].startswith("0 of 56 rows")


# ---- a real run ----


@pytest.fixture(scope="module")
def trained(forks, checkpoints, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    code, _, stderr = forks.run(*words(checkpoints["untied"], out, "lora", steps=14, save_steps=7))
    assert code == 0, stderr
    return out


@pytest.mark.slow
def test_the_report_of_a_run_shows_the_run(trained, run_script, tmp_path):
    code, stdout, stderr = run_script(SCRIPT, trained, "--out", tmp_path / "page.html")
    assert (code, stdout) == (0, f"report: {tmp_path / 'page.html'}\n"), stderr
    text = "\n".join(Parsed((tmp_path / "page.html").read_text()).texts)
    assert "56 conversations: 56 trained, as 56 rows" in text and "14 of 14" in text
    assert "56 rows in 2 epochs" in text and "I am Sparrow, a small model" in text
    assert "<|im_start|>" in text and f"{CONVERSATIONS}:2" in text, "the label view"
    assert (trained / "loss.png").is_file() and not (trained / "report.html").exists()
    assert run_script(SCRIPT, trained)[0] == 0 and (trained / "report.html").is_file()


@pytest.mark.slow
def test_a_run_that_trains_has_the_rows_of_its_checkpoint(trained, tmp_path):
    run = read_run(str(trained))
    assert run.rows_file == trained / "rows.parquet"
    moved = tmp_path / "rows.parquet"
    (trained / "rows.parquet").rename(moved)
    try:
        assert read_run(str(trained)).rows_file == trained / "checkpoint-14" / "rows.parquet"
        assert "As of checkpoint-14" in page_of(trained)
    finally:
        moved.rename(trained / "rows.parquet")


# ---- mistakes ----


def test_mistakes_are_one_line_each(tmp_path, run_script):
    run = write_run(tmp_path / "run")
    other = write_run(tmp_path / "other")
    (tmp_path / "file").touch()
    cases = [
        ([tmp_path / "absent", tmp_path], f"{tmp_path / 'absent'}: no such directory"),
        ([tmp_path / "file"], f"{tmp_path / 'file'}: is no directory"),
        ([tmp_path], f"{tmp_path}: no run.json in it; name the --output_dir of a run of finetune.py"),
        ([run, "--rows", "--epoch", 7], "epoch 7: the rows were trained in epochs 0 to 1"),
        ([run, "--num", 3], "--num: has no effect without --rows"),
        ([run, "--port", 3], "--port: has no effect without --serve"),
        ([run, "--serve", "--rows"], "--serve, --rows: one of them"),
        ([run, "--rows", "--out", "x"], "--out: has no effect with --rows, which writes no file"),
        ([run, other, "--rows"], "--rows: lists the rows of one run, not of 2"),
        ([run, "--rows", "--num", 0], "--num 0: must be at least 1"),
        ([run, "--serve", "--port", 70000], "--port 70000: must be from 0 (a free one) to 65535"),
        ([run, run], f"{run}: is named twice"),
        ([run, "--lr"], "unrecognized arguments: --lr; see --help"),
    ]
    for given_words, message in cases:
        code, stdout, stderr = run_script(SCRIPT, *given_words)
        assert (code, stdout, stderr.splitlines()[0]) == (2, "", f"error: {message}"), given_words
    (other / "rows.parquet").unlink()
    assert "no rows.parquet in it: it recorded none" in run_script(SCRIPT, other, "--rows")[2]
    (run / "rows.parquet").write_bytes(b"PAR1")
    assert "rows.parquet: cannot be read" in run_script(SCRIPT, run, "--rows")[2]
    assert run_script(SCRIPT, run)[0] == 0 and "rows.parquet: cannot be read" in (run / "report.html").read_text()
    for text, message in (("{", "run.json:1: invalid JSON"), ('{"a": 1}', "is not finetune.py's")):
        (run / "run.json").write_text(text)
        code, _, stderr = run_script(SCRIPT, run)
        assert code == 2 and message in stderr and len(stderr.splitlines()) == 1
    theirs = tmp_path / "theirs.html"
    theirs.write_text("<p>theirs</p>")
    assert "theirs.html: is there, and no report" in run_script(SCRIPT, other, "--out", theirs)[2]
    assert theirs.read_text() == "<p>theirs</p>"
    code, _, stderr = run_script(SCRIPT, other, "--out", tmp_path / "absent" / "page.html")
    assert code == 1 and "page.html: could not be written: No such file or directory" in stderr


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "sessions",
    "status",
    "settings",
    "data",
    "eval_data",
    "plan",
    "parameters",
    "versions",
    "git",
    "wall_s",
    "directory",
]


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(KEYS), ODD),
    st.lists(st.dictionaries(st.sampled_from(["step", "loss", "samples"]), ODD)),
)
def test_any_json_object_makes_a_page(tmp_path_factory, record, lines):
    run = tmp_path_factory.getbasetemp() / "odd"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({**record, "program": "finetune.py"}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Parsed(page_of(run))


# ---- served ----


@contextlib.contextmanager
def serving(*directories):
    """The server's port."""
    made = server.make_server([str(directory) for directory in directories], 0)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield made.server_address[1]
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def get(port, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


def test_served_to_this_machine_and_renewed(tmp_path):
    run = write_run(tmp_path, status="running")
    with serving(run) as port:
        status, headers, page = get(port)
        assert status == 200 and 'data-refresh="5"' in page and headers["Cache-Control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert get(port, host=f"localhost:{port}")[0] == 200
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
            assert get(port, host=host or " ")[0] == 403
        assert get(port, "/run.json")[0] == get(port, "/../run.json")[0] == 404 and get(port, method="POST")[0] == 501
        write_run(run, status="finished", texts={"answer": "a later answer"})
        page = get(port)[2]
        assert "a later answer" in page and "data-refresh" not in page
        (run / "run.json").unlink()
        status, headers, text = get(port)
        assert (
            status == 500 and text.startswith(f"{run}: no run.json") and headers["Content-Type"].startswith("text/pl")
        )


def test_a_port_that_is_taken(tmp_path, run_script):
    run = write_run(tmp_path)
    with serving(run) as port:
        code, _, stderr = run_script(SCRIPT, run, "--serve", "--port", port)
    assert code == 1 and stderr.startswith(f"error: --port {port}: Address already in use; leave it out")


@pytest.mark.slow
def test_ctrl_c_ends_the_server_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "tuning.report", str(write_run(tmp_path)), "--serve"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Ignored where the tests run in a shell's background; a program in a terminal gets it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", process.stdout.readline())[1])
        assert get(port)[0] == 200
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (130, "interrupted\n")
    finally:
        process.kill()
        process.communicate()


# ---- in a browser ----


@pytest.mark.slow
def test_the_page_in_a_browser(trained, tmp_path, run_script):
    assert run_script(SCRIPT, trained, "--out", tmp_path / "page.html")[0] == 0
    with chromium(tmp_path / "profile") as browser:
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.get_log("browser") == []
        assert read_requests(browser) == [(tmp_path / "page.html").as_uri()], "nothing else is loaded"
        charts_ = browser.find_elements("css selector", ".charts svg")
        assert len(charts_) == 7 and all(chart.size["height"] > 100 for chart in charts_)
        rows = browser.find_elements("css selector", "#worst-0 tbody tr")
        browser.find_element("css selector", "input[data-rows]").send_keys(rows[3].text.split("\n")[1].split()[0])
        assert [row.is_displayed() for row in rows] == [number == 3 for number in range(len(rows))]
        assert browser.execute_script("return document.body.scrollWidth <= innerWidth"), "no sideways scrolling"


@pytest.mark.slow
def test_hostile_texts_in_a_browser(tmp_path):
    attack = "</title></script></style><script>window.hit = 1</script><img src=//127.0.0.1:9/x onerror=window.hit=1>"
    run = write_run(tmp_path / "run", texts=dict.fromkeys(PLACES, attack))
    (tmp_path / "page.html").write_text(page_of(run))
    with chromium(tmp_path / "profile") as browser:
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.execute_script("return window.hit") is None
        assert browser.find_element("css selector", "#answers h3").text == attack
        assert len(read_requests(browser)) == 1 and browser.get_log("browser") == []
        # Were a text to become markup, the policy would still stand in its way.
        browser.execute_script(
            "const s = document.createElement('script'); s.text = 'window.hit = 1'; document.body.append(s)"
        )
        browser.execute_script("const i = new Image(); i.src = 'http://127.0.0.1:9/x'; document.body.append(i)")
        assert browser.execute_script("return window.hit") is None
        assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) >= 2


@pytest.mark.slow
def test_a_served_page_follows_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "REFRESH_S", 0.2)
    run = write_run(tmp_path / "run", status="running")

    def text(selector):
        return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    with chromium(tmp_path / "profile") as browser:
        with serving(run) as port:
            browser.get(f"http://127.0.0.1:{port}/")
            assert "running" in text("#state") and "loss4 → 2" in text("#runs")
            browser.execute_script("window.same = true")
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": 3, "loss": 1.0}) + "\n" + '{"step": 4, "lo')
            wait_until(lambda: "loss4 → 1" in text("#runs"))
            assert "3 of 4" in text("#runs") and browser.execute_script("return window.same"), "it was not loaded again"
            write_run(run, status="finished", texts={"answer": "the last answer"})
            wait_until(lambda: "finished" in text("#state"))
            assert "the last answer" in text("#answers")
            read_requests(browser)
        assert "finished" in text("#state"), "it asks no more"
        assert not [e for e in browser.get_log("browser") if "favicon" not in e["message"]]
