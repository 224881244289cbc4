"""Whole and torn checkpoints: on real files, and the trainer's saving and resuming with verl's own part played by a stub."""

import errno
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from mxfp4_rl import checkpoints
from mxfp4_rl.files import cut_at_step, lines_from_end
from mxfp4_rl.launch.progress import Tail
from mxfp4_rl.monitor.alerts import Alerts
from mxfp4_rl.settings import GuardSettings, Settings
from mxfp4_rl.verl_plugin.guards import Guards
from mxfp4_rl.verl_plugin.loggers import drop_records_past

SHARD = "actor/model_world_size_1_rank_0.pt"


def write_files(folder: Path) -> None:
    (folder / "actor/huggingface").mkdir(parents=True, exist_ok=True)
    (folder / SHARD).write_bytes(b"m" * 1000)
    (folder / "actor/huggingface/config.json").write_text("{}")
    (folder / "data.pt").write_bytes(b"d" * 10)


def whole(root: Path, step: int) -> Path:
    folder = checkpoints.folder_of(root, step)
    checkpoints.begin(folder)
    write_files(folder)
    checkpoints.seal(folder)
    return folder


# ---- what is whole


def test_a_sealed_checkpoint_is_whole_and_lists_every_file(tmp_path):
    folder = whole(tmp_path, 3)
    assert checkpoints.is_whole(folder) and checkpoints.flaw(folder) is None
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    assert manifest == {"step": 3, "files": {SHARD: 1000, "actor/huggingface/config.json": 2, "data.pt": 10}}
    assert checkpoints.size(folder) == 1012
    assert checkpoints.latest_whole(tmp_path) == (folder, [])


TEARS = {
    "missing file": (lambda f: (f / SHARD).unlink(), f"{SHARD} is missing"),
    "short file": (lambda f: (f / SHARD).write_bytes(b"m" * 999), f"{SHARD} has 999 bytes of 1000"),
    "empty file": (lambda f: (f / "data.pt").write_bytes(b""), "data.pt has 0 bytes of 10"),
    "longer file": (lambda f: (f / "data.pt").write_bytes(b"d" * 11), "data.pt has 11 bytes of 10"),
    "a folder in a file's place": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), f"{SHARD} is missing"),
    "no manifest": (lambda f: (f / "complete.json").unlink(), "complete.json, which is written last, is missing"),
    "half a manifest": (lambda f: (f / "complete.json").write_text('{"step": 2, "fi'), "complete.json is not readable"),
    "another manifest": (lambda f: (f / "complete.json").write_text("[1]"), "complete.json is not readable"),
    "manifest not yet renamed": (
        lambda f: (f / "complete.json").rename(f / "complete.json.writing"),
        "complete.json, which is written last, is missing",
    ),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "complete.json, which is written last, is missing"),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("")), "it is no folder"),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_one_is_named_and_the_one_before_is_taken(tmp_path, tear):
    first, last = whole(tmp_path, 9), whole(tmp_path, 10)  # 10 is past 9 by number, not by name
    damage, lacks = TEARS[tear]
    damage(last)
    assert not checkpoints.is_whole(last)
    found, torn = checkpoints.latest_whole(tmp_path)
    assert found == first
    assert [folder for folder, _ in torn] == [last] and torn[0][1].startswith(lacks)
    assert str(last) in checkpoints.describe_torn(*torn[0]) and lacks in checkpoints.describe_torn(*torn[0])


def test_nothing_whole(tmp_path):
    assert checkpoints.latest_whole(tmp_path / "nowhere") == (None, [])
    (tmp_path / "global_step_4").mkdir()
    (tmp_path / "global_step_x").mkdir()
    (tmp_path / "global_step_5.removing").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    found, torn = checkpoints.latest_whole(tmp_path)
    assert found is None and [folder.name for folder, _ in torn] == ["global_step_4"]


def test_beginning_again_clears_what_a_killed_run_left(tmp_path):
    folder = whole(tmp_path, 2)
    checkpoints.begin(folder)
    assert list(folder.iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["global_step_2"]


def test_pruning_keeps_the_latest_whole_ones_and_touches_no_other(tmp_path):
    folders = {step: whole(tmp_path, step) for step in (8, 9, 10, 11, 50)}
    (folders[11] / SHARD).unlink()
    leftover = tmp_path / f"global_step_7{checkpoints.REMOVING}"
    leftover.mkdir()
    assert checkpoints.prune(tmp_path, None, step=12) == [] and not leftover.exists()
    assert checkpoints.prune(tmp_path, 5, step=12) == []
    assert checkpoints.prune(tmp_path, 1, step=12) == [folders[8], folders[9]]  # 11 is torn, 50 another run's
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_10", "global_step_11", "global_step_50"]
    assert checkpoints.prune(tmp_path, 1, step=12) == []  # the torn one never pushes out the last whole one
    assert checkpoints.is_whole(folders[10])


def test_full_disks_are_told_from_other_errors():
    wrapped = RuntimeError("ray")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert checkpoints.is_full_disk(wrapped) and checkpoints.is_full_disk(OSError(errno.EDQUOT, "Disk quota exceeded"))
    torch_error = RuntimeError(
        "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3: ..."
    )
    assert checkpoints.is_full_disk(torch_error)
    assert not checkpoints.is_full_disk(ValueError("no such layer")) and not checkpoints.is_full_disk(PermissionError(13, "no"))


# ---- the metrics of steps that are done again


def test_lines_past_the_checkpoint_are_dropped_and_shown_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "data": {"x": step}}) + "\n" for step in (0, 1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "da')
    tail = Tail(path, from_end=True)
    assert drop_records_past(tmp_path, 2) == ([(step, {"x": step}) for step in (0, 1, 2)], 2)
    assert path.read_text() == "".join(lines[:3])
    assert tail.new_lines() == []
    with path.open("a") as file:
        file.write(lines[3])
    assert tail.new_lines() == [lines[3].strip()]
    assert drop_records_past(tmp_path, 3)[1] == 0 and drop_records_past(tmp_path / "nowhere", 3) == ([], 0)


@pytest.mark.parametrize(("log", "content"), [("metrics.jsonl", "data"), ("experts.jsonl", "layers")])
def test_every_log_is_cut_the_same_way(tmp_path, log, content):
    path = tmp_path / log
    stays = [f'{{"step":{step},  "{content}": {{"x": 1}}}}\n' for step in (0, 1)]  # other spaces than ours stay, too
    path.write_text(stays[0] + f'[1]\nnull\n{{"step": null, "{content}": {{}}}}\n{{"step": 1}}\n' + stays[1].strip())
    assert cut_at_step(path, 1, content) == 0 and path.read_text() == "".join(stays)
    assert cut_at_step(path, 0, content) == 1 and path.read_text() == stays[0]
    assert cut_at_step(tmp_path / "nowhere", 0, content) == 0 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize("text", ["", "\n", "one", "one\n\ntwö\nthree of them", "one\ntwo\n"])
def test_lines_from_the_end_are_those_from_the_start(tmp_path, text, chunk):
    (tmp_path / "log").write_text(text, encoding="utf-8")
    assert list(lines_from_end(tmp_path / "log", chunk)) == text.split("\n")[::-1]


# ---- the trainer


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Our trainer with verl's saving and loading replaced; `trainer.write` is what verl's workers do."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    from mxfp4_rl.verl_plugin.trainer import MXFP4TrainerSync

    trainer = object.__new__(MXFP4TrainerSync)
    settings = {"default_local_dir": str(tmp_path / "ck"), "resume_mode": "auto", "resume_from_path": None}
    trainer.config = OmegaConf.create({"trainer": settings})
    trainer.settings, trainer.run_dir, trainer.keep_checkpoints = Settings(), tmp_path, 2
    trainer.saved, trainer.write = [], write_files
    trainer.alerts = Alerts({"entropy": (1.0, None)}, calm=1)
    trainer.guards = Guards(GuardSettings(), batch_size=4)
    trainer.actor_rollout_wg = SimpleNamespace(weights_are_finite=lambda: [True])
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **seen: trainer.saved.append(Path(seen["checkpoint_dir"])))

    def save(self):
        folder = checkpoints.folder_of(tmp_path / "ck", self.global_steps)
        self.write(folder)
        (tmp_path / "ck/latest_checkpointed_iteration.txt").write_text(str(self.global_steps))
        self.checkpoint_callback.on_save(trainer=self, global_step=self.global_steps, checkpoint_dir=str(folder))

    def load(self):
        disabled = self.config.trainer.resume_mode == "disable"
        self.global_steps = 0 if disabled else checkpoints.step_of(self.config.trainer.resume_from_path)

    monkeypatch.setattr(PPOTrainerSync, "_save_checkpoint", save)
    monkeypatch.setattr(PPOTrainerSync, "_load_checkpoint", load)
    return trainer


def save(trainer, *steps):
    for trainer.global_steps in steps:
        trainer._save_checkpoint()


def names(trainer):
    return sorted(path.name for path in Path(trainer.config.trainer.default_local_dir).glob("global_step_*"))


def test_the_trainer_keeps_the_last_n_and_resumes_from_the_last_whole_one(trainer, capsys, tmp_path):
    save(trainer, 1, 2, 3)
    assert names(trainer) == ["global_step_2", "global_step_3"] and all(map(checkpoints.is_whole, trainer.saved[1:]))
    assert [checkpoints.step_of(folder) for folder in trainer.saved] == [1, 2, 3]  # the user's callback sees whole ones
    assert "global_step_1 is removed: the last 2 are kept" in capsys.readouterr().out

    def killed(folder):
        write_files(folder)
        raise KeyboardInterrupt

    trainer.write = killed
    with pytest.raises(KeyboardInterrupt):
        save(trainer, 4)
    lines = [json.dumps({"step": step, "data": {"actor/entropy": 0.5}}) + "\n" for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    trainer._load_checkpoint()
    out = capsys.readouterr().out
    assert trainer.global_steps == 3 and trainer.config.trainer.resume_mode == "auto"
    assert "global_step_4 is torn and skipped: complete.json, which is written last, is missing" in out
    assert "global_step_3, step 3; steps logged past it are done again: 1" in out
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])
    assert trainer.alerts.check(4, {"actor/entropy": 0.5}) == []  # it was told before the kill, and is not told again
    trainer.write = write_files
    save(trainer, 4)
    assert names(trainer) == ["global_step_3", "global_step_4"]


def test_without_a_whole_one_the_run_starts_from_scratch(trainer, capsys):
    trainer._load_checkpoint()
    assert trainer.global_steps == 0
    save(trainer, 1)
    (Path(trainer.config.trainer.default_local_dir) / "global_step_1" / SHARD).unlink()
    trainer._load_checkpoint()
    assert trainer.global_steps == 0 and f"is torn and skipped: {SHARD} is missing" in capsys.readouterr().out


def test_random_numbers_go_on_where_the_checkpoint_left_them(trainer):
    import torch

    save(trainer, 1)
    expected = torch.rand(3)
    trainer._load_checkpoint()
    assert torch.equal(torch.rand(3), expected)


def test_a_disk_full_in_mid_checkpoint_ends_the_run_in_words_and_leaves_the_one_before(trainer):
    save(trainer, 1)

    def full(folder):
        (folder / "actor").mkdir()
        (folder / SHARD).write_bytes(b"m" * 5)
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.write = full
    with pytest.raises(
        RuntimeError, match=r"disk is full: .* step 2 .*global_step_2 \(.* were free\).*global_step_1, which is whole"
    ):
        save(trainer, 2)
    assert names(trainer) == ["global_step_1"] and len(trainer.saved) == 1
    trainer.write = lambda folder: (_ for _ in ()).throw(ValueError("another matter"))
    with pytest.raises(ValueError, match="another matter"):
        save(trainer, 2)
    assert checkpoints.latest_whole(trainer.config.trainer.default_local_dir)[0].name == "global_step_1"


def test_too_little_room_is_said_before_anything_is_written(trainer, monkeypatch):
    save(trainer, 1)
    monkeypatch.setattr(checkpoints, "free", lambda root: 1011)  # the last one took 1012 and this process's random state
    with pytest.raises(RuntimeError, match=r"no room for the checkpoint of step 2: .* are free .* the last one took"):
        save(trainer, 2)
    assert names(trainer) == ["global_step_1"]


def test_a_really_full_disk(trainer, tmp_path):
    """A file system of 64 KiB, torch's own writer, and nothing pretended but the size."""
    import torch

    small = tmp_path / "ck"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        trainer.write = lambda folder: torch.save(torch.zeros(2000), folder / "model.pt")
        save(trainer, 1)
        trainer.write = lambda folder: torch.save(torch.zeros(100_000), folder / "model.pt")
        with pytest.raises(RuntimeError, match="the disk is full: the checkpoint of step 2 could not be written"):
            save(trainer, 2)
        assert names(trainer) == ["global_step_1"] and checkpoints.is_whole(small / "global_step_1")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # the error that torch raised holds its file open
