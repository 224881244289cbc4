"""`mxfp4-rl report --watch`: what it says of a run in every condition, over HTTP and in a real browser."""

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import checkpoints
from mxfp4_rl.cli import main
from mxfp4_rl.launch import LaunchError, run_state
from mxfp4_rl.launch.outcome import view_lines
from mxfp4_rl.monitor.live import LiveRun, duration
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.monitor.watch import Watched, make_server, page_pieces
from tests.browser import CHROMIUM, Browser
from tests.test_report import CONFIG, make_records


def record(step, **data):
    data = {"critic/score/mean": 0.5, "timing_s/step": 2.0, "actor/entropy": 1.0} | {
        k.replace("__", "/"): v for k, v in data.items()
    }
    return json.dumps({"step": step, "data": data}) + "\n"


def append(run_dir, *lines):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.writelines(lines)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def status_of(run_dir, now=None):
    run = LiveRun(run_dir)
    run.read()
    return run.status(now)


def test_a_run_from_its_first_second_to_its_end(run_dir):
    run = LiveRun(run_dir)
    assert run.status()["state"] == "waiting"

    state = run_state.begin(run_dir)
    (run_dir / "verl.log").write_text("\x1b[36m(TaskRunner pid=9)\x1b[0m [mxfp4] trainer: first weight sync\n")
    run.read()
    status = run.status()
    assert (status["state"], status["phase"], status["step"]) == ("running", "trainer: first weight sync", None)
    assert run.run_log() is None

    append(run_dir, record(1), record(2), record(3)[:25])  # a line that is being written
    run.read()
    status = run.status()
    assert (status["state"], status["phase"], status["step"], status["total"]) == ("running", "training", 2, 40)
    assert status["seconds_a_step"] == "2.0 s" and status["eta"] in ("1:16 min", "1:15 min") and not status["notes"]
    append(run_dir, record(3)[25:])
    run.read()
    assert run.status()["step"] == 3

    run_state.end(run_dir, state, 0)
    status = run.status()
    assert (status["state"], status["running"], status["eta"], status["phase"]) == ("finished", False, None, None)


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [(0, "finished", "end"), (1, "failed", "exit code 1"), (130, "interrupted", "Ctrl-C"), (143, "interrupted", "SIGTERM")],
)
def test_how_a_run_ended(code, state, why, run_dir):
    append(run_dir, record(1))
    (run_dir / "verl.log").write_text("Traceback (most recent call last):\nValueError: the reward is a banana\n")
    run_state.end(run_dir, run_state.begin(run_dir), code)
    status = status_of(run_dir)
    assert status["state"] == state and why in status["why"] and not status["running"]
    assert ("banana" in (status["failure"] or "")) == (state == "failed")


def test_a_killed_launcher_is_noticed(run_dir):
    append(run_dir, record(1))
    code = "import sys, time, pathlib; from mxfp4_rl.launch import run_state; run_state.begin(pathlib.Path(sys.argv[1]));"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); time.sleep(600)", run_dir], stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    assert status_of(run_dir)["state"] == "running"
    process.kill()
    deadline = time.monotonic() + 60
    while (status := status_of(run_dir))["state"] == "running":  # also while it is a zombie that nobody has waited for
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status["state"] == "died" and "killed" in status["why"]
    process.wait()
    assert status_of(run_dir)["state"] == "died"


def die(run_dir, log_start=0):
    """A launcher that is gone without a word."""
    run_state._write(run_dir, dataclasses.replace(run_state.begin(run_dir, log_start), process_began=0.0))


def with_checkpoint(run_dir, command):
    root = run_dir / "checkpoints"
    (run_dir / "config.yaml").write_text(f"trainer: {{default_local_dir: {root}}}\n")
    (run_dir / "versions.json").write_text(json.dumps({"command": command, "directory": "/some where"}))
    folder = checkpoints.folder_of(root, 5)
    checkpoints.begin(folder)
    checkpoints.seal(folder)
    return folder


def test_a_killed_launcher_and_how_to_go_on_are_told(run_dir):
    given = ["mxfp4-rl", "train", "trainer.save_freq=5", "mxfp4.run_dir=x", "++trainer.resume_mode=disable", "a.b='c d'"]
    folder = with_checkpoint(run_dir, given)
    append(run_dir, record(1))
    die(run_dir)
    (run_dir / "verl.log").write_text(
        "(x pid=7) ValueError: an old one that verl caught\n"
        "[mxfp4] the launcher is gone: ending the run\n"
        "[mxfp4] fault: raylet (Ray's daemon on this node, process 9) died\n(y pid=8) RuntimeError: all is lost\n"
    )
    status = status_of(run_dir)
    assert status["state"] == "died" and status["failure"].startswith("the launcher was killed")
    assert not any(word in status["failure"] for word in ("raylet", "lost", "caught"))
    assert status["resume"] == (
        f"last checkpoint: {folder}; to go on from there:\n"
        f"cd '/some where' && mxfp4-rl train trainer.save_freq=5 {shlex.quote(given[-1])} "
        f"trainer.resume_mode=auto mxfp4.run_dir={run_dir}"
    )
    (run_dir / "versions.json").unlink()
    assert f"the same command with trainer.resume_mode=auto mxfp4.run_dir={run_dir}" in status_of(run_dir)["resume"]


def test_what_an_earlier_part_of_a_resumed_run_said_is_not_its_last_word(run_dir):
    log = run_dir / "verl.log"
    log.write_text("[mxfp4] trainer: first weight sync\nValueError: of the first part\n")
    first = log.stat().st_size
    run = LiveRun(run_dir)
    run.read()
    state = run_state.begin(run_dir, log_start=first)
    run.read()
    assert run.status()["phase"] is None
    run_state.end(run_dir, state, 1)
    assert status_of(run_dir)["failure"] == "the log is empty"
    with open(log, "a") as file:
        file.write("KeyError: of the second part\n")
    assert status_of(run_dir)["failure"] == "KeyError: of the second part"
    die(run_dir, log_start=first)
    assert status_of(run_dir)["failure"] == "KeyError: of the second part"
    assert status_of(run_dir)["resume"] is None  # the configuration does not say where checkpoints are


def test_every_part_of_an_offline_wandb_run_is_named(run_dir):
    assert view_lines(run_dir) == []
    parts = [run_dir / "wandb" / f"offline-run-2026010{n}_000000-x" for n in (1, 2)]  # the first one was killed, say
    for part in parts:
        part.mkdir(parents=True)
    assert view_lines(run_dir) == [f"     view  wandb sync {parts[0]} {parts[1]}"]


def test_another_process_with_the_launchers_number_is_not_taken_for_it(run_dir):
    state = run_state.begin(run_dir)
    run_state._write(run_dir, dataclasses.replace(state, process_began=state.process_began - 1000))
    assert status_of(run_dir)["state"] == "died"


def test_without_the_launchers_word_the_files_age_decides(run_dir):
    append(run_dir, record(1))
    now = (run_dir / "metrics.jsonl").stat().st_mtime
    assert status_of(run_dir, now + 200)["state"] == "stalled"
    assert status_of(run_dir, now + 20)["state"] == "running"
    stopped = status_of(run_dir, now + 400)
    assert stopped["state"] == "stopped" and "6:40 min" in stopped["why"] and "did not start it" in stopped["why"]
    run_state._write(run_dir, dataclasses.replace(run_state.begin(run_dir), host="another-host"))
    assert "another-host" in status_of(run_dir, now + 400)["why"]
    append(run_dir, record(40))
    assert status_of(run_dir, now + 400)["state"] == "finished"


def test_a_run_that_hangs_is_told(run_dir):
    append(run_dir, record(1))
    run_state._write(run_dir, dataclasses.replace(run_state.begin(run_dir), began=0.0))
    logged = (run_dir / "metrics.jsonl").stat().st_mtime
    assert status_of(run_dir, logged + 70)["state"] == "running"
    status = status_of(run_dir, logged + 90)
    assert status["state"] == "stalled" and status["running"] and "1:30 min" in status["why"]


def test_a_resumed_run_shows_its_own_start_and_goes_back_to_its_own_step(run_dir):
    append(run_dir, *(record(step) for step in range(1, 8)))
    os.utime(run_dir / "metrics.jsonl", (time.time() - 1000,) * 2)
    run = LiveRun(run_dir)
    run_state.begin(run_dir)
    (run_dir / "verl.log").write_text("Resuming from /x/global_step_5\n[mxfp4] alarm: step 7: no phase\n")
    run.read()
    status = run.status()
    assert (status["state"], status["phase"], status["eta"]) == ("running", "loading the checkpoint /x/global_step_5", None)
    append(run_dir, record(6))
    run.read()
    status = run.status()
    assert (status["step"], status["phase"]) == (6, "training")


def test_a_file_that_became_shorter_is_read_anew(run_dir):
    append(run_dir, *(record(step) for step in range(1, 8)))
    run = LiveRun(run_dir)
    run.read()
    (run_dir / "metrics.jsonl").write_text(record(1))
    run.read()
    assert run.step == 1 and run.run_log().names() and list(run.run_log().records) == [1]


def test_alerts_come_and_go(run_dir):
    run = LiveRun(run_dir)
    for step, active, entropy in [(1, 0, 1.0), (2, 1, 0.001), (3, 1, 0.002), (4, 0, 0.5), (5, 1, math.nan)]:
        append(run_dir, record(step, mxfp4_alerts__entropy=float(active), actor__entropy=entropy))
        run.read()
        assert [alert["name"] for alert in run.status()["alerts"]] == ["entropy"] * active
        if step == 3:
            (alert,) = run.status()["alerts"]
            assert (alert["step"], alert["now"]) == (2, "0.002") and alert["text"] == "actor/entropy was 0.001 at step 2"
    assert [(alert["step"], alert["active"]) for alert in run.status()["history"]] == [(5, True), (4, False), (2, True)]
    assert run.status()["alerts"][0]["text"] == "actor/entropy was not finite at step 5"


def test_a_broken_configuration_is_a_note(run_dir):
    append(run_dir, record(1))
    (run_dir / "config.yaml").write_text("a: [1\n")
    assert "not readable as YAML" in status_of(run_dir)["notes"][0]


@given(
    lines=st.lists(
        st.one_of(st.integers(0, 9).map(record), st.sampled_from(["\n", "{\n", '{"step": 3, "da', "null\n"])), max_size=8
    ),
    cuts=st.lists(st.integers(0, 2000), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_reading_in_pieces_is_reading_at_once(lines, cuts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    content = "".join(lines) + record(11)
    run, metrics = LiveRun(folder), folder / "metrics.jsonl"
    for cut in sorted(cuts):
        metrics.write_text(content[:cut])
        run.read()
    metrics.write_text(content)
    run.read()
    at_once = RunLog.load(folder)
    assert (run.run_log().records, run.run_log().unreadable_lines) == (at_once.records, at_once.unreadable_lines)


def test_durations():
    found = [duration(seconds) for seconds in (-1, 0.84, 9.96, 59.4, 59.6, 185, 3599.6, 7384)]
    assert found == ["0.0 s", "0.8 s", "10 s", "59 s", "1:00 min", "3:05 min", "1:00:00 h", "2:03:04 h"]


@contextmanager
def served(run_dir, **options):
    with make_server(run_dir, 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


def get(url, host=None):
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers.get_content_type(), answer.read()


def test_over_http(run_dir):
    with served(run_dir, refresh=0.0) as server:
        assert server.server_address[0] == "127.0.0.1"
        status = json.loads(get(server.url + "status.json")[1])
        assert (status["state"], status["has_metrics"]) == ("waiting", False)
        assert b"not logged anything yet" in get(server.url + "body.html")[1]
        append(run_dir, *(json.dumps(line) + "\n" for line in make_records(steps=5, layers=2)))
        newer = json.loads(get(server.url + "status.json")[1])
        assert newer["step"] == 5 and newer["version"] > status["version"]
        body = get(server.url + "body.html")[1].decode()
        assert "Error by layer" in body and "SmolLM2-135M-Instruct" in body
        for query, width in (("", 1500), ("&narrow=1", 690)):
            kind, png = get(f"{server.url}plot/reward.png?v=1{query}")
            assert kind == "image/png" and int.from_bytes(png[16:20], "big") == width
        kind, page = get(server.url)
        assert kind == "text/html" and b"<script>" in page and b"{{" not in page
    assert not (run_dir / "report").exists()


def test_the_page_comes_with_its_status_table_and_plots(run_dir, monkeypatch):
    """A browser shows the head while the plots are drawn, and calls the page loaded when they are there."""
    append(run_dir, *(json.dumps(line) + "\n" for line in make_records(steps=5, layers=2)))
    watched = Watched(run_dir)
    pieces = page_pieces(watched)
    head = next(pieces)
    assert "drawing the table and the plots" in head and '"step": 5' in head and not watched._plots
    body, rest = pieces
    assert "SmolLM2-135M-Instruct" in body and body.count("<img") == 7 and "shown = 1;" in rest

    def fails():
        raise RuntimeError("no room for plots")

    monkeypatch.setattr(watched, "body", fails)
    assert [*page_pieces(watched)][1] == "" and "shown = -1;" in [*page_pieces(watched)][2]


@pytest.mark.parametrize("path", ["nothing", "plot/nothing.png", "plot/../config.yaml", "config.yaml"])
def test_nothing_else_is_served(path, run_dir):
    append(run_dir, record(1))
    with served(run_dir) as server:
        get(server.url + "status.json")
        get(server.url + "body.html")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server.url + path)


@pytest.mark.parametrize(
    ("host", "allowed"), [("localhost:9000", True), ("127.0.0.1", True), ("evil.example:80", False), ("", False)]
)
def test_only_names_of_this_machine_are_answered(host, allowed, run_dir):
    append(run_dir, record(1))
    with served(run_dir) as server:
        if allowed:
            assert get(server.url + "status.json", host)[1]
        else:
            with pytest.raises(urllib.error.HTTPError, match="403"):
                get(server.url + "status.json", host or "x")


def test_plots_of_a_running_run_are_not_drawn_more_often_than_asked_for(run_dir):
    state = run_state.begin(run_dir)
    append(run_dir, record(1))
    with served(run_dir, refresh=3600.0) as server:
        versions = []
        for step in (2, 3):
            append(run_dir, record(step))
            versions.append(json.loads(get(server.url + "status.json")[1])["version"])
        assert versions[0] == versions[1]
        run_state.end(run_dir, state, 0)  # the last plots are there at once
        assert json.loads(get(server.url + "status.json")[1])["version"] == versions[0] + 1


def test_a_name_is_text_and_no_markup(tmp_path):
    folder = tmp_path / "<b>run & co"
    folder.mkdir()
    with served(folder) as server:
        page = get(server.url)[1].decode()
    assert "&lt;b&gt;run &amp; co" in page and "<b>run" not in page


def test_the_command_serves_until_ctrl_c(run_dir):
    append(run_dir, record(1))
    command = [sys.executable, "-m", "mxfp4_rl.cli", "report", str(run_dir), "--watch", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = sorted(run_dir.iterdir())
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line
    url = next(word for word in line.split() if word.startswith("http"))
    assert json.loads(get(url + "status.json")[1])["step"] == 1
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in output
    assert sorted(run_dir.iterdir()) == before


def test_mistakes_are_told_in_one_sentence(run_dir, capsys):
    with served(run_dir) as server:
        assert main(["report", str(run_dir), "--watch", "--port", str(server.server_port)]) == 2
    assert main(["report", str(run_dir), "--watch", "--port", "70000"]) == 2
    assert main(["report", str(run_dir), "--port", "8000"]) == 2
    assert main(["report", str(run_dir / "nothing"), "--watch"]) == 2
    errors = capsys.readouterr().err.splitlines()
    expected = ["cannot be used", "port 70000 cannot be used", "give --watch too", "no run directory at"]
    assert [want in line for want, line in zip(expected, errors, strict=True)] == [True] * 4
    with pytest.raises(LaunchError, match="no run directory"):
        make_server(run_dir, 0, overlay=run_dir / "nothing")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: `apt-get install chromium`")
def test_what_is_loaded_is_drawn(run_dir, tmp_path):
    """A screenshot is taken when the page has loaded: table and plots are there, asked for by no script."""
    append(run_dir, *(json.dumps(line) + "\n" for line in make_records(steps=6, layers=2)))
    with served(run_dir) as server, Browser(tmp_path / "profile") as page:
        page.open(server.url)
        page.wait_for("document.readyState == 'complete' && location.port != ''")
        assert page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth > 0).length") == 7
        assert "SmolLM2-135M-Instruct" in page.text() and "drawing the table" not in page.text()
        assert not any("body.html" in url for url in page.requests) and page.errors == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: `apt-get install chromium`")
def test_in_a_browser(run_dir, tmp_path):
    """One run, watched: it starts, trains, alarms, dies, is resumed and finishes; the page follows without being reloaded."""
    lines = [json.dumps(line) + "\n" for line in make_records(steps=6, layers=2)]
    state = run_state.begin(run_dir)
    with Browser(tmp_path / "profile") as page:
        with served(run_dir, refresh=0.0) as server:
            page.open(server.url)
            page.wait_for("document.title.startsWith('running ·')")
            page.wait_for("document.body.innerText.includes('not logged anything yet')")
            page.evaluate("window.notReloaded = true")

            append(run_dir, *lines[:3])
            page.wait_for("document.title.startsWith('running 2/40')")
            page.wait_for(
                "document.images.length == 7 && [...document.images].every(i => i.complete && i.naturalWidth == 1500)"
            )
            assert "2 of 40" in page.text() and "arithmetic acc 0.230 (step 0)" in page.text()
            assert page.evaluate("document.querySelector('#bar div').style.width") == "5%"

            append(run_dir, record(3, mxfp4_alerts__entropy=1.0, actor__entropy=0.001))
            page.wait_for("document.title.startsWith('(!) running 3/40')")
            page.wait_for("document.querySelector('#alerts .box').innerText.startsWith('Alert: entropy since step 3')")
            page.wait_for("document.images[0].src.includes('v=' + shown) && shown > 1")

            page.resize(480)
            page.wait_for("[...document.images].every(i => i.complete && i.naturalWidth == 690)")
            for width in (480, 1280):
                page.resize(width)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                overlaps = "[...document.querySelectorAll('dd,dt')].filter(e => e.scrollWidth > e.clientWidth).length"
                assert page.evaluate(overlaps) == 0

            run_state._write(run_dir, dataclasses.replace(state, process_began=0.0))
            (run_dir / "verl.log").write_text("Traceback (most recent call last):\nMemoryError: <b>no room</b>\n")
            page.wait_for("document.getElementById('state').innerText == 'died'")
            assert (
                "MemoryError: <b>no room</b>" in page.text()
                and page.evaluate("document.querySelector('#failure pre b')") is None
            )

            state = run_state.begin(run_dir)
            append(run_dir, lines[4][:40], record(40, mxfp4_alerts__entropy=0.0))
            page.wait_for("document.title.startsWith('running 40/40')")
            run_state.end(run_dir, state, 0)
            page.wait_for("document.title.startsWith('finished 40/40')")
            page.wait_for("document.getElementById('alerts').innerText == ''")
            assert "1 incomplete line" in page.text() and page.evaluate("document.querySelectorAll('#history li').length") == 2
            assert page.evaluate("window.notReloaded") is True
            assert page.errors == []
            assert all(url.startswith((server.url, "data:", "about:")) for url in page.requests), page.requests
        page.wait_for("!document.getElementById('gone').hidden")
