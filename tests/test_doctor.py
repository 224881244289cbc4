"""mxfp4-rl doctor: what it says of this machine, and of one where libraries are broken or missing."""

import json
import os
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from mxfp4_rl import doctor

CHEAP = [rung for rung in doctor.RUNGS if rung[0] not in ("ray starts", "training run")]


def by_name(checks):
    return {check.name: check for check in checks}


def broken_modules(folder, **sources):
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_this_machine_is_told_rung_by_rung(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "RUNGS", CHEAP)
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "training can run here"
    assert all(line.startswith(("ok  ", "warning ")) and line[9] != " " for line in lines[:-1])
    found = [line.split()[1] for line in lines[:-1]]
    order = [
        "python",
        "system",
        "memory",
        "disk",
        "cores",
        "torch",
        "verl",
        "TransferQueue",
        "hydra-core",
        "wandb",
        "ray",
        "cuda",
    ]
    assert [name for name in found if name in order] == order
    assert found.index("quantise") < found.index("vllm") < found.index("self-test")

    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] and [check["name"].split()[0] for check in report["checks"]] == found


def test_paths_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks = by_name([*doctor._kernel_paths(), *doctor._self_test()])
    assert checks["quantise"].text == "PyTorch reference"
    assert "no FP8" in checks["product fp8"].text and "product fp4" not in checks
    assert "bit for bit on cpu" in checks["self-test"].text and checks["self-test"].state == "ok"


def test_a_quantiser_with_other_bits_fails_the_self_test(monkeypatch):
    from mxfp4_rl.quant import quantizer

    right = quantizer.fake_quantize
    monkeypatch.setattr(quantizer, "fake_quantize", lambda *a, **k: right(*a, **k) * 1.01)
    (check,) = doctor._self_test()
    assert check.state == "missing" and "differs from the reference" in check.text


@pytest.mark.parametrize(
    ("driver", "build", "available", "state", "part"),
    [
        (None, None, False, "ok", "no NVIDIA driver"),
        ("570.1", None, False, "warning", "torch is a CPU build"),
        ("450.1", "12.8", False, "warning", "finds no GPU with driver 450.1"),
        ("570.1", "12.8", True, "ok", "torch for CUDA 12.8, driver 570.1"),
    ],
)
def test_torch_against_the_driver(driver, build, available, state, part, monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr("torch.version.cuda", build)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    (check,) = doctor._cuda()
    assert check.state == state and part in check.text and bool(check.fix) == (state != "ok")


def test_packages_against_their_ranges(monkeypatch):
    assert doctor._package(Requirement("packaging>=1")).state == "ok"
    old = doctor._package(Requirement("packaging>=9999"))
    assert (old.state, old.fix) == ("missing", "pip install 'packaging>=9999'") and "wanted: >=9999" in old.text
    absent = doctor._package(Requirement("no-such-package>=2"))
    assert (absent.state, absent.text) == ("missing", "not installed (wanted: >=2)")
    monkeypatch.setattr("platform.python_version", lambda: "3.8.0")
    (python,) = doctor._python()
    assert python.state == "missing" and python.text.startswith("3.8.0")
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-package")
    (python,) = doctor._python()
    assert (python.state, python.fix) == ("missing", "pip install -e .")


def test_vllm_and_flash_attention(monkeypatch):
    versions = {"vllm": "0.1.0", "flash-attn": "2.8"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # installed, and cannot be imported
    (vllm,), (flash,) = doctor._vllm(), doctor._flash_attention()
    assert vllm.state == "warning" and vllm.text.startswith("0.1.0") and "pip install 'vllm" in vllm.fix
    assert flash.state == "warning" and "cannot be imported" in flash.text
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    (flash,) = doctor._flash_attention()
    assert flash.state == "ok" and "2.8" in flash.text


def test_a_vllm_that_lacks_a_package_is_a_warning_since_a_run_can_do_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", {"vllm": "0.22.0"}.__getitem__)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["humming-kernels[cu13]==0.1.2; python_version >= '3'"])
    monkeypatch.setattr(doctor, "RUNGS", (("vllm", (), doctor._vllm),))
    assert doctor.main([]) == 0
    _, lacks, verdict = capsys.readouterr().out.splitlines()
    assert lacks.startswith("warning  vllm needs") and lacks.endswith("->  pip install 'humming-kernels[cu13]==0.1.2'")
    assert verdict == "training can run here"


def test_warnings_do_not_fail_and_what_is_missing_does(monkeypatch, capsys):
    def answers(*checks):
        return lambda: iter(checks)

    def breaks():
        raise SystemExit("no")

    some = ("a", (), answers(doctor.Check("a", "warning", "so so", "do it")))
    monkeypatch.setattr(doctor, "RUNGS", (some,))
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "warning  a              so so  ->  do it"
    monkeypatch.setattr(doctor, "RUNGS", (some, ("b", (), breaks), ("c", ("b",), answers(doctor.Check("c", "ok", "")))))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "missing  b              SystemExit: no" in out and "missing  c              not tried: b first" in out


@pytest.mark.parametrize(
    "sources",
    [
        {"torch": "raise OSError('libcudart.so.12: cannot open shared object file')", "ray": "import sys; sys.exit(3)"},
        {"hydra": "raise RuntimeError('boom')", "omegaconf": "raise RuntimeError('boom')", "rich": "1 / 0"},
        {"psutil": "import no_such_module", "matplotlib": "def broken(:", "packaging": "raise ImportError('gone')"},
    ],
    ids=lambda sources: "+".join(sources),
)
def test_broken_libraries_give_lines_and_no_traceback(sources, tmp_path):
    command = [sys.executable, "-m", "mxfp4_rl.cli", "doctor"]
    environment = broken_modules(tmp_path, **sources)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("training cannot run here")
    for module in {"torch", "ray", "hydra", "rich"} & set(sources):
        assert any(line.startswith("missing") and module in line for line in done.stdout.splitlines()), done.stdout


@pytest.mark.slow
def test_the_whole_ladder_with_a_run(tmp_path):
    command = [sys.executable, "-m", "mxfp4_rl.cli", "doctor", "--run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert done.returncode == 0 and report["ready"], report
    assert checks["ray starts"]["state"] == checks["training run"]["state"] == "ok"
    assert list(tmp_path.iterdir()) == []
