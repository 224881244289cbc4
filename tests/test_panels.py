"""Grouped panels: which metrics a section holds, the workspace on wandb, the layout in TensorBoard."""

import json
import re
from pathlib import Path

import pytest

from mxfp4_rl.monitor import panels
from mxfp4_rl.verl_plugin.loggers import attach_run_log

# The names that a run of the tiny model logged; tests/test_verl_run.py holds them to a run of today.
NAMES = json.loads((Path(__file__).parent / "metric_names.json").read_text())
TITLES = ["training", "error components", "per layer", "rollout mismatch", "kernels and time", "alerts"]
RUN_DIR_CONFIG = "trainer: {project_name: my-project}\n"


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text(RUN_DIR_CONFIG)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": dict.fromkeys(NAMES, 0.5)}) + "\n")
    return tmp_path


def test_every_section_of_a_real_run_has_panels_of_its_metrics():
    found = panels.sections(NAMES)
    assert [section.title for section in found] == TITLES
    for section in found:
        assert section.panels and all(panel.metrics(NAMES) for panel in section.panels)
        assert len({panel.title for panel in section.panels}) == len(section.panels)


@pytest.mark.parametrize("family", ["mxfp4/", "mxfp4_share/", "mxfp4_layers/", "mxfp4_sync/", "mxfp4_alerts/", "val-core/"])
def test_no_metric_of_ours_is_forgotten(family):
    drawn = [name for section in panels.sections(NAMES) for panel in section.panels for name in panel.metrics(NAMES)]
    assert {name for name in NAMES if name.startswith(family)} <= set(drawn)
    assert len(drawn) == len(set(drawn))


def test_a_panel_of_a_projection_has_a_line_a_layer():
    layers = next(section for section in panels.sections(NAMES) if section.title == "per layer")
    panel = next(panel for panel in layers.panels if panel.title == "q_proj: rel_mse")
    assert panel.metrics(NAMES) == [f"mxfp4_layers/model.layers.{n}.self_attn.q_proj/rel_mse" for n in (0, 1)]


def test_what_a_run_does_not_log_has_no_panel():
    plain = [name for name in NAMES if "mxfp4" not in name]
    assert [section.title for section in panels.sections(plain)] == [
        "training",
        "rollout mismatch",
        "kernels and time",
        "alerts",
    ]
    assert panels.sections([]) == []


def test_the_workspace_holds_the_runs_metrics_and_no_others(run_dir, capsys):
    pytest.importorskip("wandb_workspaces", reason="pip install wandb-workspaces, which is in the extra dev")
    from recipes import wandb_workspace

    assert wandb_workspace.main([str(run_dir), "--entity", "us", "--print"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["entity"], view["project"], view["displayName"]) == ("us", "my-project", "MXFP4")
    found = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in found] == TITLES
    for section in found:
        assert section["panels"]
        for panel in section["panels"]:
            assert panel["viewType"] == "Run History Line Plot"
            assert panel["config"]["metrics"] and set(panel["config"]["metrics"]) <= set(NAMES)


@pytest.mark.parametrize(
    ("config", "hidden", "expected"),
    [("{}", (), "--project"), (RUN_DIR_CONFIG, ("wandb_workspaces",), "pip install wandb-workspaces")],
)
def test_what_the_script_needs(config, hidden, expected, run_dir, capsys, monkeypatch):
    from recipes import wandb_workspace

    (run_dir / "config.yaml").write_text(config)
    for name in hidden:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(SystemExit) as caught:
        wandb_workspace.main([str(run_dir), "--print"])
    assert caught.value.code == 2 and expected in capsys.readouterr().err


class Tracking:
    """As far as verl's is needed, with its TensorBoard adapter."""

    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self.logger = {"tensorboard": self}

    def log(self, data, step):
        pass


def layouts(folder):
    """Every layout of custom scalars in the event files of `folder`."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.custom_scalar import layout_pb2

    found = []
    for path in sorted(Path(folder).rglob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "custom_scalars__config__":
                    layout = layout_pb2.Layout()
                    layout.ParseFromString(value.tensor.string_val[0])
                    found.append(layout)
    return found


def test_tensorboard_gets_the_same_groups_once(tmp_path):
    tracking = attach_run_log(Tracking(tmp_path / "events"), tmp_path)
    validation = {"val-core/arithmetic/acc/mean@1"}
    first = dict.fromkeys(set(NAMES) - validation, 0.5)
    for step, data in enumerate([dict.fromkeys(validation, 0.5), first, first]):
        for backend in tracking.logger.values():
            backend.log(data=data, step=step)
    tracking.writer.close()

    (layout,) = layouts(tmp_path / "events")
    assert [category.title for category in layout.category] == TITLES
    expected = {
        section.title: {panel.title: panel.metrics(NAMES) for panel in section.panels} for section in panels.sections(NAMES)
    }
    for category in layout.category:
        # As TensorBoard does: every tag is a regular expression that matches from a name's start on.
        drawn = {
            chart.title: sorted(name for name in NAMES if any(re.match(tag, name) for tag in chart.multiline.tag))
            for chart in category.chart
        }
        assert drawn == expected[category.title]
