"""A saved view on wandb, its panels grouped as `mxfp4_rl.monitor.panels` says: `python recipes/wandb_workspace.py RUN_DIR`.

The run directory says which metrics there are and which project they were logged to; the view is for every run of the
project. It needs `pip install wandb-workspaces` and, to save, `wandb login`; `--print` shows the view and needs no network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mxfp4_rl.monitor import panels
from mxfp4_rl.monitor.run_log import RunLog

OPEN = (panels.TRAINING.title, panels.COMPONENTS.title, panels.ALERTS.title)


def make_workspace(names: Sequence[str], entity: str, project: str, title: str):
    """A wandb_workspaces Workspace with a section for each of `panels.sections`, drawn from the metrics `names`."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=title,
        sections=[
            workspaces.Section(
                name=section.title,
                panels=[reports.LinePlot(title=panel.title, x="Step", y=panel.metrics(names)) for panel in section.panels],
                is_open=section.title in OPEN,
            )
            for section in panels.sections(names)
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="a run of the project, for the names of its metrics; it may still go on")
    parser.add_argument("--entity", help="the user or team on wandb; default: of whoever is logged in")
    parser.add_argument("--project", help="default: the run's trainer.project_name")
    parser.add_argument("--title", default="MXFP4", help="of the view; default: %(default)s")
    parser.add_argument("--print", action="store_true", help="print the view as JSON and save nothing")
    options = parser.parse_args(argv)
    try:
        run = RunLog.load(options.run_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    project = options.project or run.config_value("trainer.project_name")
    if not project:
        parser.error(f"{options.run_dir} has no config.yaml that names the project: give --project")
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        parser.error("the package wandb-workspaces is missing: pip install wandb-workspaces")
    if options.print:
        workspace = make_workspace(run.names(), options.entity or "me", project, options.title)
        print(json.dumps(workspace._to_model().model_dump(mode="json", by_alias=True), indent=2))
        return 0
    import wandb

    if not wandb.login(prompt=False):
        parser.error("nobody is logged in to wandb: run `wandb login`, or use --print")
    print(make_workspace(run.names(), options.entity or wandb.Api().default_entity, project, options.title).save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
