"""The report of a run: what is read from a run directory, what is computed from it, and what the page contains."""

import base64
import json
import math
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from mxfp4_rl.monitor import report as report_module
from mxfp4_rl.monitor.plots import moving_average
from mxfp4_rl.monitor.report import describe_recipe, quarter_means, summary, write_report
from mxfp4_rl.monitor.run_log import RunLog, layer_map, parse_layer_name

PLOTS = ["reward", "entropy", "components", "shares", "layers", "mismatch", "time"]
PROJECTIONS = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
CONFIG = """
actor_rollout_ref: {model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}}
trainer: {total_training_steps: 40}
mxfp4:
  enable: true
  recipe: {scale_rule: rceil, macro_block: static, fallback_alpha: 0.5, activation: {macro_block: null}}
  aqn: {enable: true, sigma_start: 0.01, sigma_end: 0.001}
"""


def make_records(steps=20, layers=30, quantised=True, seed=0):
    """Records as a run of `steps` steps logs them, step 0 being the validation before training."""
    rng = np.random.default_rng(seed)
    records = [{"step": 0, "data": {"val-core/arithmetic/acc/mean@1": 0.23 if quantised else 0.5}}]
    for step in range(1, steps + 1):
        progress = step / steps
        data = {
            "critic/score/mean": 0.1 + 0.8 * progress + 0.05 * rng.standard_normal() * (1 - progress),
            "actor/entropy": 1.6 * math.exp(-1.5 * progress) + 0.02 * rng.standard_normal(),
            "actor/grad_norm": 0.3,
            "rollout_corr/kl": 0.003 * rng.standard_normal(),
            "rollout_corr/k3_kl": (0.02 if quantised else 0.0005) * math.exp(0.3 * rng.standard_normal()),
            "training/rollout_probs_diff_mean": (0.03 if quantised else 0.004) * math.exp(0.1 * rng.standard_normal()),
            "timing_s/gen": 8 + rng.random() + (15 if step == 1 else 0),
            "timing_s/old_log_prob": 2.0,
            "timing_s/update_actor": 6 + 0.3 * rng.random(),
            "timing_s/update_weights": 0.8,
            "timing_s/testing": 5.0,
        }
        data["timing_s/step"] = 0.7 + sum(data[f"timing_s/{p}"] for p in ["gen", "old_log_prob", "update_actor"])
        data["timing_s/step"] += data["timing_s/update_weights"]
        if step % 5 == 0:
            data["val-core/arithmetic/acc/mean@1"] = 0.3 + 0.6 * progress
        if quantised:
            data |= {"mxfp4_sync/seconds": 0.6, "mxfp4_sync/bytes": 7.2e7}
            data["mxfp4/aqn_sigma"] = 0.0 if progress <= 0.1 else 0.01 * 0.1 ** ((progress - 0.1) / 0.9)
            for prefix, error in [("", 0.0135), ("activation/", 0.016)]:
                first = error * (1 + 0.02 * progress + 0.003 * rng.standard_normal())
                data |= {
                    f"mxfp4/{prefix}scale_bias": 1.1 * first,
                    f"mxfp4/{prefix}deadzone": 0.022 * first,
                    f"mxfp4/{prefix}grid_noise": 0.9 * first,
                    f"mxfp4/{prefix}fallback": 0.25 * first,
                    f"mxfp4/{prefix}rel_mse": 0.25 * first,
                    f"mxfp4_share/{prefix}scale_bias": 1.1,
                    f"mxfp4_share/{prefix}deadzone": 0.022 * (1 + 0.2 * progress),
                    f"mxfp4_share/{prefix}grid_noise": 0.9,
                }
            for layer in range(layers):
                for block, names in PROJECTIONS.items():
                    for name in names:
                        base = 0.0135 * (1 + 0.1 * rng.standard_normal() + 0.5 * (name == "down_proj" and layer < 2))
                        for part, share in [("scale_bias", 1.1), ("deadzone", 0.022), ("grid_noise", 0.9)]:
                            data[f"mxfp4_layers/model.layers.{layer}.{block}.{name}/{part}"] = share * base
                        data[f"mxfp4_layers/model.layers.{layer}.{block}.{name}/fallback"] = 0.25 * base
                        data[f"mxfp4_layers/model.layers.{layer}.{block}.{name}/rel_mse"] = 0.25 * base
        records.append({"step": step, "data": data})
    return records


def write_run(path, records, config=CONFIG, tail=""):
    path.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines + tail)
    if config is not None:
        (path / "config.yaml").write_text(config)
    return path


def one_metric_run(path, values, name="critic/score/mean"):
    return write_run(path, [{"step": i + 1, "data": {name: v}} for i, v in enumerate(values)], config=None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quantised = write_run(root / "mbs_of_aqn", make_records(), tail='{"step": 21, "data": {"critic/score/me')
    config = "actor_rollout_ref: {model: {path: some/model}}\nmxfp4: {enable: false}\n"
    bf16 = write_run(root / "bf16", make_records(quantised=False, seed=1), config=config)
    return quantised, bf16


@pytest.fixture(scope="module")
def overlaid(runs):
    """The full report: a quantised run with the BF16 run over it."""
    return write_report(runs[0], overlay=runs[1])


class _Page(HTMLParser):
    """Collects what a page's tags refer to, its text, and its table rows."""

    def __init__(self, html):
        super().__init__()
        self.references, self.images, self.tags, self.text, self.rows = [], [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.images if value.startswith("data:image/png;base64,") else self.references).append(value)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip("\n")

    def row(self, label):
        return next(row[1:] for row in self.rows if row[0] == label)


# --- reading a run directory


def test_series_merges_records_of_a_step_and_the_later_value_wins(tmp_path):
    records = [
        {"step": 2, "data": {"a": 1.0, "b": 5}},
        {"step": 1, "data": {"a": 0.5}},
        {"step": 2, "data": {"a": 2.0}},
    ]
    run = RunLog.load(write_run(tmp_path / "run", records))
    steps, values = run.series("a")
    assert steps.tolist() == [1, 2] and values.tolist() == [0.5, 2.0]
    assert run.series("b")[1].tolist() == [5.0]
    assert run.names() == ["a", "b"] and run.name == "run"
    assert [len(part) for part in run.series("unknown")] == [0, 0]


def test_torn_last_line_and_values_that_are_not_finite(tmp_path):
    path = write_run(tmp_path / "run", [{"step": 1, "data": {"a": 1.0}}])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "data": {"a": NaN, "b": Infinity, "c": null, "d": "text"}}\n')
        file.write('{"step": 3, "data": {"a": 1.0, "é'.encode()[:-1])  # cut inside a character
    run = RunLog.load(path)
    steps, values = run.series("a")
    assert steps.tolist() == [1, 2] and values[0] == 1.0 and np.isnan(values[1])
    assert np.isnan(run.series("b")[1]).all() and np.isnan(run.series("c")[1]).all()
    assert "d" not in run.names() and not run.has("b")
    assert run.unreadable_lines == 1


def test_resumed_run_that_appended_to_a_torn_line_keeps_the_appended_record(tmp_path):
    tail = '{"step": 2, "data": {"a": 1.\n{"step": 2, "da{"step": 3, "data": {"a": 7.0}}\n'
    run = RunLog.load(write_run(tmp_path / "run", [{"step": 1, "data": {"a": 1.0}}], tail=tail))
    assert run.series("a")[0].tolist() == [1, 3] and run.unreadable_lines == 2


def test_errors_say_what_is_missing_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run directory"):
        RunLog.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    expected = re.escape(str(tmp_path / "empty" / "metrics.jsonl"))
    with pytest.raises(FileNotFoundError, match=f"did the run log anything.* expected {expected}"):
        RunLog.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="no complete record"):
        RunLog.load(write_run(tmp_path / "torn", [], tail='{"step": 1, "da'))
    with pytest.raises(ValueError, match=r"config\.yaml is not readable as YAML"):
        RunLog.load(write_run(tmp_path / "yaml", [{"step": 1, "data": {}}], config="a: [1"))
    with pytest.raises(ValueError, match="holds a list, expected"):
        RunLog.load(write_run(tmp_path / "list", [{"step": 1, "data": {}}], config="- 1"))


def test_config_is_optional_and_read_by_dotted_key(runs, tmp_path):
    run = RunLog.load(runs[0])
    assert run.config_value("trainer.total_training_steps") == 40
    assert run.config_value("trainer.total_training_steps.deeper", "default") == "default"
    assert RunLog.load(one_metric_run(tmp_path / "run", [1.0])).config == {}


# --- layers


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.3.self_attn.q_proj", (3, ("self_attn", "q_proj"))),
        ("model.layers.47.mlp.experts.101.down_proj", (47, ("mlp", "experts", "down_proj"))),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj", (0, ("mlp", "up_proj"))),
        ("base_model.model.layers.11.self_attn.v_proj.base_layer", (11, ("self_attn", "v_proj"))),
        ("transformer.h.7.attn.c_attn.weight", (7, ("attn", "c_attn"))),
        ("lm_head", None),
        ("model.layers.3", None),
        ("", None),
    ],
)
def test_parse_layer_name(name, expected):
    assert parse_layer_name(name) == expected


def test_layer_map_has_every_value_in_its_cell(runs):
    run = RunLog.load(runs[0])
    found = layer_map(run)
    assert found.step == 20 and found.layers == list(range(30))
    assert found.projections == ["q", "k", "v", "o", "gate", "up", "down"] and found.unplaced == []
    expected = run.records[20]["mxfp4_layers/model.layers.3.self_attn.q_proj/deadzone"]
    assert found.values["deadzone"][3, 0] == expected
    expected = run.records[20]["mxfp4_layers/model.layers.29.mlp.down_proj/rel_mse"]
    assert found.values["rel_mse"][29, 6] == expected


def test_layer_map_averages_experts_and_survives_names_it_cannot_place(tmp_path):
    data = {
        "mxfp4_layers/model.layers.1.mlp.experts.0.gate_proj/rel_mse": 0.01,
        "mxfp4_layers/model.layers.1.mlp.experts.1.gate_proj/rel_mse": 0.03,
        "mxfp4_layers/model.layers.1.mlp.experts.2.gate_proj/rel_mse": math.nan,
        "mxfp4_layers/model.layers.0.mlp.gate_proj/rel_mse": 0.05,
        "mxfp4_layers/model.layers.0.self_attn.q_proj/rel_mse": 0.07,
        "mxfp4_layers/connector.projection/rel_mse": 0.5,
        "mxfp4_layers/model.layers.0.self_attn.q_proj/unknown": 9.0,
    }
    path = write_run(tmp_path / "moe", [{"step": 4, "data": data}, {"step": 5, "data": {"critic/score/mean": 0.1}}])
    found = layer_map(RunLog.load(path))
    assert found.step == 4 and found.unplaced == ["connector.projection"]
    # The dense and the expert projection of the same name keep as much of their path as tells them apart.
    assert found.projections == ["q", "experts.gate", "mlp.gate"]
    expected = [[0.07, math.nan, 0.05], [math.nan, 0.02, math.nan]]
    np.testing.assert_allclose(found.values["rel_mse"], expected)
    assert list(found.values) == ["rel_mse"]
    page = _Page(write_report(path).read_text())
    assert "connector.projection" in page.text and (path / "report" / "layers.png").is_file()


def test_layers_without_any_placeable_name_are_left_out(tmp_path):
    path = write_run(tmp_path / "run", [{"step": 1, "data": {"mxfp4_layers/lm_head/rel_mse": 0.1}}])
    assert layer_map(RunLog.load(path)) is None
    write_report(path)
    assert not (path / "report" / "layers.png").exists()


# --- numbers


def test_quarter_means_are_exact():
    assert quarter_means(np.arange(8.0)) == (0.5, 6.5)
    assert quarter_means(np.arange(10.0)) == (0.5, 8.5)  # a quarter of 10 is 2 whole steps
    assert quarter_means(np.array([3.0])) == (3.0, 3.0)
    assert quarter_means(np.array([math.nan, 2.0, 5.0, 5.0, 5.0, 5.0, 4.0, 8.0])) == (2.0, 6.0)
    first, last = quarter_means(np.array([math.nan, 1.0, 1.0, 1.0]))
    assert math.isnan(first) and last == 1.0


def test_moving_average_looks_back_and_skips_gaps():
    averages = moving_average(np.array([math.nan, 2.0, 4.0, math.nan, 6.0]), 3)
    np.testing.assert_allclose(averages, [math.nan, 2.0, 3.0, 3.0, 5.0])


def test_summary_of_a_hand_made_run(tmp_path):
    records = [{"step": 0, "data": {"val-core/gsm8k/acc/mean@1": 0.25, "val-core/gsm8k/reward/mean@1": 0.9}}]
    for step in range(1, 9):
        records.append(
            {
                "step": step,
                "data": {
                    "critic/rewards/mean": step / 10,
                    "actor/entropy": 2.0 - step / 8,
                    "mxfp4/rel_mse": 0.01 + step / 1000,
                    "mxfp4/deadzone": 0.0003,
                    "mxfp4/fallback": 0.0,
                    "rollout_corr/k3_kl": 0.002 if step % 2 else 0.004,
                    "timing_s/step": 10.0 if step > 1 else 24.0,
                    "mxfp4_sync/bytes": 1e6,
                },
            }
        )
    records[-1]["data"]["val-core/gsm8k/acc/mean@1"] = 0.75
    rows = summary(RunLog.load(write_run(tmp_path / "run", records)))
    assert rows["Model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert rows["Steps"] == "8 (1 to 8) of 40 planned"
    assert rows["Mean training reward, first → last quarter"] == "0.15 → 0.75 (+0.600)"
    assert rows["Validation accuracy, first → last"] == "0.25 → 0.75 (steps 0 and 8)"
    assert rows["Entropy, first → last"] == "1.875 → 1"
    assert rows["Last rel_mse of the weights"] == "0.018"
    assert rows["Last components of the weights"] == "deadzone 0.0003, fallback 0"
    assert rows["Mean k3 KL, rollout to trainer"] == "0.003"
    assert rows["Mean seconds a step"] == "11.75"
    assert rows["Mean bytes a weight sync"] == "1,000,000"
    assert "Last rel_mse of the activations" not in rows


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ([0, 0], "none"),
        ([1, 1, 0, 0, 1, 0, 1], "entropy (steps 1 to 2, step 5, since step 7)"),
        ([0, None, 1, 1], "entropy (since step 3)"),
    ],
)
def test_summary_tells_the_alerts(active, expected, tmp_path):
    records = [{"step": step, "data": {"mxfp4_alerts/entropy": value}} for step, value in enumerate(active, 1)]
    records[1]["data"] = {} if active[1] is None else records[1]["data"]
    found = summary(RunLog.load(write_run(tmp_path / "run", records)))["Alerts"]
    assert found == expected


def test_describe_recipe():
    text = describe_recipe({"mxfp4": {"enable": True, "recipe": {"fallback_alpha": 0.5, "activation": None}}})
    assert "OF 0.5" in text and "W:" in text and "A:" not in text
    text = describe_recipe({"mxfp4": {"enable": True, "recipe": {"exclude": ["layers.0"], "no_such_key": 1}}})
    assert "no_such_key" in text and "not a recipe of this version" in text
    config = {"mxfp4": {"enable": True, "recipe": {"exclude": ["head"]}, "aqn": {"enable": True, "sigma_start": 0.01}}}
    assert describe_recipe(config).endswith("; excluded: head; AQN: sigma_start 0.01")
    assert "AQN" not in describe_recipe({"mxfp4": {"enable": True, "aqn": {"enable": False}}})
    assert describe_recipe({"mxfp4": {"enable": False}}) == "not quantised (mxfp4.enable is false)"
    assert describe_recipe({"trainer": {}}) == "not quantised (no mxfp4 block)"
    assert describe_recipe({}).startswith("unknown")


# --- the page


def test_every_plot_is_a_png_with_something_in_it(overlaid):
    for name in PLOTS:
        pixels = matplotlib.image.imread(overlaid.parent / f"{name}.png")
        height, width = pixels.shape[:2]
        assert width >= 1200 and height >= 400, name
        assert pixels[..., :3].var() > 0.001, f"{name} is blank"
        # A plot that holds its data only in a corner would pass the variance: ink must reach all four quarters.
        ink = pixels[..., :3].min(axis=-1) < 0.9
        for rows in (slice(0, height // 2), slice(height // 2, height)):
            for columns in (slice(0, width // 2), slice(width // 2, width)):
                assert ink[rows, columns].mean() > 0.001, name


def test_page_stands_alone_and_embeds_the_plots(overlaid):
    html = overlaid.read_text()
    page = _Page(html)
    assert page.references == [] and "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"https?://|url\(|@import", html)
    embedded = [base64.b64decode(image.split(",", 1)[1]) for image in page.images]
    assert embedded == [(overlaid.parent / f"{name}.png").read_bytes() for name in PLOTS]


def test_overlay_gets_a_column_and_changes_the_plots(runs, overlaid, tmp_path):
    page = _Page(overlaid.read_text())
    assert page.rows[0] == ["", "mbs_of_aqn", "bf16"]
    quantised, bf16 = summary(RunLog.load(runs[0])), summary(RunLog.load(runs[1]))
    assert page.row("Mean seconds a step") == [quantised["Mean seconds a step"], bf16["Mean seconds a step"]]
    assert page.row("Last rel_mse of the weights") == [quantised["Last rel_mse of the weights"], "n/a"]
    assert page.row("Recipe")[1] == "not quantised (mxfp4.enable is false)"
    assert "1 incomplete line(s) of mbs_of_aqn/metrics.jsonl" in page.text
    alone = write_report(runs[0], out_dir=tmp_path / "alone")
    assert alone == tmp_path / "alone" / "report.html"
    for name in ["reward", "entropy", "mismatch", "time"]:
        assert (alone.parent / f"{name}.png").read_bytes() != (overlaid.parent / f"{name}.png").read_bytes(), name


def test_bf16_run_says_why_it_has_no_components(runs, tmp_path):
    path = write_report(runs[1], overlay=runs[0], out_dir=tmp_path)
    assert {p.stem for p in tmp_path.glob("*.png")} == {"reward", "entropy", "mismatch", "time"}
    text = _Page(path.read_text()).text
    assert text.count("config.yaml says that this run was not quantised") == 3
    assert "no usable value of mxfp4_share/*" in text
    assert "mbs_of_aqn has them" in text


@pytest.mark.parametrize("values", [[0.5], [math.nan, 0.5, math.nan], [-3.0, 2.0], [0.0] * 5])
def test_short_gappy_and_constant_series_are_drawn(tmp_path, values):
    records = [
        {"step": i + 1, "data": dict.fromkeys(["critic/score/mean", "actor/entropy", "timing_s/step"], v)}
        for i, v in enumerate(values)
    ]
    for i, record in enumerate(records):
        record["data"] |= {
            "mxfp4/rel_mse": values[i], "mxfp4_share/deadzone": values[i], "mxfp4/aqn_sigma": values[i],
            "rollout_corr/k3_kl": values[i], "mxfp4_layers/model.layers.0.mlp.up_proj/rel_mse": values[i],
        }  # fmt: skip
    path = write_report(write_run(tmp_path / "run", records))
    assert (path.parent / "reward.png").is_file() and (path.parent / "mismatch.png").is_file()


def test_run_with_one_unknown_metric_gets_a_report_without_plots(tmp_path):
    path = write_report(one_metric_run(tmp_path / "run", [1.0, 2.0], name="perf/throughput"))
    page = _Page(path.read_text())
    assert page.images == [] and page.text.count("Not drawn") == len(PLOTS)
    assert page.row("Steps") == ["none trained"]


def test_everything_that_comes_from_a_run_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>&\"'$x_1$"
    config = json.dumps({"actor_rollout_ref": {"model": {"path": evil}}, "mxfp4": {"recipe": {evil: 1}}})
    records = [
        {
            "step": i,
            "data": {
                "critic/score/mean": 0.5,
                f"val-core/{evil}/acc/mean@1": 0.5,
                f"val-core/{evil}2/acc/mean@1": 0.5,
                f"mxfp4_layers/{evil}/rel_mse": 0.1,
                f"mxfp4_layers/model.layers.0.{evil}/rel_mse": 0.1,
            },
        }
        for i in range(3)
    ]
    path = write_report(write_run(tmp_path / "<b>$run$", records, config=config))
    html = path.read_text()
    assert "script" not in _Page(html).tags and "b" not in _Page(html).tags
    assert "&lt;script&gt;" in html and "<b>$run$" in _Page(html).text


def test_an_interrupted_write_leaves_the_earlier_report(tmp_path, monkeypatch):
    path = write_report(one_metric_run(tmp_path / "run", [0.5, 0.6]))
    before = path.read_bytes()

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "run")
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "reward.png"}


def test_plots_of_an_earlier_report_do_not_linger(runs, tmp_path):
    write_report(runs[0], out_dir=tmp_path)
    write_report(runs[1], out_dir=tmp_path)
    assert not (tmp_path / "components.png").exists()


def test_sections_cover_the_documented_files():
    always = [section.file for section in report_module.SECTIONS if not section.optional]
    assert always == [f"{name}.png" for name in PLOTS]
