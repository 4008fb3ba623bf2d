"""The plan of a call on a GPU, its options, and a rehearsal of some of it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from bench import on_gpu, parts
from bench.on_gpu import Plan, chosen
from bench.parts import Part, Stage


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A checkout in which the CUDA kernels are built; returns its root."""
    for folder in ("sft_kernels", "tests/csrc", "tests/ops"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sft_kernels" / "_C.abi3.so").touch()
    for name in ("csrc/test_on_gpu.py", "ops/test_adamw_gpu.py"):
        (tmp_path / "tests" / name).write_text("pytestmark = pytest.mark.gpu\n")
    (tmp_path / "tests" / "ops" / "test_adamw.py").write_text("")
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def tool(root, name):
    (root / name).touch()
    (root / name).chmod(0o755)


def all_parts(plan):
    return {part.name: part for stage in plan.stages() for part in stage.parts}


def test_the_most_valuable_part_comes_first(library, tmp_path):
    names = [stage.name for stage in Plan(tmp_path).stages()]
    assert names == list(on_gpu.PARTS)
    wanted = "smoke tests verify loss attention adamw step sweep memcheck".split()
    assert [name for name in names if name in wanted] == wanted
    assert names[0] == "compile"
    assert names[-1] == "memcheck"


def test_smoke_and_verify_have_a_process_for_each_op_and_implementation(library, tmp_path):
    stages = {stage.name: stage for stage in Plan(tmp_path).stages()}
    for name in ("smoke", "verify"):
        assert stages[name].side_by_side == 4
        found = {part.name for part in stages[name].parts}
        assert found == {f"{name}.{op}.{impl}" for op, impls in on_gpu.IMPLEMENTATIONS.items() for impl in impls}
        for part in stages[name].parts:
            _, op, implementation = part.name.split(".")
            command = " ".join(part.command)
            assert f"--ops {op} --impls {implementation}" in command
            assert ("--smoke" in command) == (name == "smoke")
            assert (part.env.get("CUDA_LAUNCH_BLOCKING") == "1") == (name == "smoke")
    assert {*on_gpu.IMPLEMENTATIONS} == {*verify_ops()}


def verify_ops():
    from sft_kernels._backend import implementations
    from sft_kernels.verify import OPS

    assert {op: {*implementations(core)} for op, (core, *_) in OPS.items()} == {
        op: {*impls} for op, impls in on_gpu.IMPLEMENTATIONS.items()
    }
    return OPS


def test_gpu_tests_have_a_process_a_file_and_run_side_by_side(library, tmp_path):
    (stage,) = chosen(Plan(tmp_path).stages(), ["tests"])
    assert [part.name for part in stage.parts] == ["tests.csrc.test_on_gpu", "tests.ops.test_adamw_gpu"]
    assert stage.side_by_side > 1


def test_without_the_cuda_kernels_their_parts_fail_unless_told(library, tmp_path):
    assert all_parts(Plan(tmp_path))["smoke.adamw.cuda"].command
    (library / "sft_kernels" / "_C.abi3.so").unlink()
    tool(library, "compute-sanitizer")
    theirs = {"smoke.adamw.cuda", "verify.cross_entropy.cuda", "tests.csrc.test_on_gpu", "memcheck.cuda"}
    found = all_parts(Plan(tmp_path))
    assert all("not built" in found[name].broken for name in theirs)
    assert {name for name, part in found.items() if part.broken} >= theirs
    assert not any(part.broken for name, part in found.items() if "cuda" not in name and "csrc" not in name)
    found = all_parts(Plan(tmp_path, without_cuda=True))
    assert all(found[name].absent == on_gpu.NO_CUDA for name in theirs)
    assert not any(part.broken for part in found.values())


def test_tools_that_are_not_there_are_named_and_leave_the_clocks_alone(library, tmp_path):
    found = all_parts(Plan(tmp_path))
    assert found["counters.core"].absent == "ncu is not on the path"
    assert found["memcheck.triton"].absent == "compute-sanitizer is not on the path"
    tool(library, "ncu")
    tool(library, "compute-sanitizer")
    found = all_parts(Plan(tmp_path))
    assert found["counters.core"].command[-2:] == ("--profile", str(tmp_path / "counters.core.csv"))
    assert found["memcheck.triton"].command[:3] == ("compute-sanitizer", "--tool", "memcheck")


def test_memcheck_sees_the_bounds_of_each_allocation(library, tmp_path):
    tool(library, "compute-sanitizer")
    assert all_parts(Plan(tmp_path))["memcheck.triton"].env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_gpu_tests_that_are_all_skipped_have_not_passed(library, tmp_path):
    part = all_parts(Plan(tmp_path))["tests.ops.test_adamw_gpu"]
    assert part.env == {"SFT_KERNELS_NO_SKIPS": "1"}
    test = tmp_path / "test_it.py"
    for code, status in (("import pytest\n\ndef test():\n    pytest.skip()", 1), ("def test():\n    pass", 0)):
        test.write_text(code)
        options = [*on_gpu.QUIET, "-p", "tests.conftest", "--rootdir", tmp_path, test]
        root = parts.ROOT
        done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=root, env=os.environ | part.env)
        assert done.returncode == status


def test_impl_flash_is_verified_with_the_library_that_the_wheels_bring(library, tmp_path):
    assert "slow.verify.packed_attention.flash" not in all_parts(Plan(tmp_path))
    part = all_parts(Plan(tmp_path, peers=tmp_path))["slow.verify.packed_attention.flash"]
    assert "--impls flash" in " ".join(part.command)


def test_kernels_are_compiled_in_parallel_without_the_gpu_on_every_machine(library, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    stage = Plan(tmp_path, arch=80).stages()[0]
    assert stage.again
    assert stage.side_by_side == 3
    assert [part.command[-3:] for part in stage.parts] == [("80", "--share", f"{i}/3") for i in range(3)]
    assert all(part.env["CUDA_VISIBLE_DEVICES"] == "" for part in stage.parts)


def test_a_rehearsal_has_the_same_parts(library, tmp_path):
    real, rehearsed = all_parts(Plan(tmp_path)), all_parts(Plan(tmp_path, rehearse=True))
    assert {name for name in real if not name.startswith("compile")} == {
        name for name in rehearsed if not name.startswith("compile")
    }
    for name in ("loss", "attention", "adamw", "step", "sweep", "given"):
        assert "bench.pretend" in rehearsed[name].command
        assert "--tiny" in rehearsed[name].command
        assert "bench.pretend" not in real[name].command
        assert "--tiny" not in real[name].command


def test_rivals_that_compile_for_long_come_late_and_hold_up_nobody(library, tmp_path):
    found = all_parts(Plan(tmp_path))

    def rivals(name):
        return found[name].command[found[name].command.index("--rivals") + 1]

    assert {rivals(name) for name in ("loss", "attention", "adamw", "given")} == {"quick"}
    assert {rivals(name) for name in ("slow.loss", "slow.attention", "slow.given")} == {"slow"}
    names = list(found)
    assert max(map(names.index, ("loss", "attention", "adamw", "step", "sweep"))) < names.index("slow.attention")


def test_names_mean_a_stage_a_part_or_its_beginning():
    stages = [
        Stage("a", (Part("a"),)),
        Stage("smoke", (Part("smoke.x.cuda"), Part("smoke.x.triton"), Part("smoke.xy.t"))),
    ]

    def found(*only):
        return [part.name for stage in chosen(stages, only) for part in stage.parts]

    assert found("a") == ["a"]
    assert found("smoke") == ["smoke.x.cuda", "smoke.x.triton", "smoke.xy.t"]
    assert found("smoke.x") == ["smoke.x.cuda", "smoke.x.triton"]
    assert found("smoke.x.cuda", "a") == ["a", "smoke.x.cuda"]
    assert found("smok") == []


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Puts stages in the plan's place; builds stay inside the test's folder."""
    monkeypatch.setattr(on_gpu, "CACHE", tmp_path / "build" / "gpu_cache")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return lambda *stages: monkeypatch.setattr(Plan, "stages", lambda self: list(stages))


def python(code, *arguments):
    return (sys.executable, "-c", code, *map(str, arguments))


def call(tmp_path, *arguments, out="out", minutes=1):
    return on_gpu.main(["--out", str(tmp_path / out), "--minutes", str(minutes), "--rehearse", *arguments])


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_status_says_whether_every_part_passed(tmp_path, planned, ok):
    planned(
        Stage("a", (Part("a", 20, python("" if ok else "raise SystemExit(1)")),)),
        Stage("b", (Part("b", 20, python("")),)),
    )
    assert call(tmp_path) == (0 if ok else 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [parts.ARCHIVE, parts.SUMMARY]
    assert "a rehearsal" in (tmp_path / "out" / parts.SUMMARY).read_text()
    assert not any((tmp_path / "build" / "on_gpu").iterdir())


def test_two_calls_the_second_after_the_first(tmp_path, planned, capsys):
    planned(Stage("a", (Part("a", 20, python("")),)), Stage("b", (Part("b.x", 20, python("raise SystemExit(1)")),)))
    assert call(tmp_path, out="first") == 1
    planned(Stage("a", (Part("a", 20, python("raise SystemExit(1)")),)), Stage("b", (Part("b.x", 20, python("")),)))
    assert call(tmp_path, "--after", str(tmp_path / "first"), out="second") == 0
    assert "passed before" in (tmp_path / "second" / parts.SUMMARY).read_text()
    assert call(tmp_path, "--only", "b", out="third") == 0
    assert parts.passed_in(tmp_path / "third")[1] == {"b.x"}


@pytest.mark.parametrize("name", ["device", "torch", "triton"])
def test_what_passed_on_another_machine_is_not_taken_for_passed(tmp_path, planned, capsys, monkeypatch, name):
    """Nor a rehearsal's for a GPU's."""
    planned(Stage("a", (Part("a", 20, python("")),)))
    assert call(tmp_path, out="first") == 0
    if name == "device":
        monkeypatch.setattr(on_gpu, "_gpu", lambda: ("NVIDIA H100", 90))
        arguments = ["--out", str(tmp_path / "second"), "--minutes", "1", "--after", str(tmp_path / "first")]
    else:
        arguments = [
            "--out",
            str(tmp_path / "second"),
            "--minutes",
            "1",
            "--after",
            str(tmp_path / "first"),
            "--rehearse",
        ]
        versions = on_gpu.versions()
        monkeypatch.setattr(on_gpu, "versions", lambda: versions | {name: "0.1"})
    with pytest.raises(SystemExit):
        on_gpu.main(arguments)
    assert f"--after: {tmp_path / 'first'} is of {name} " in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_the_wheels_come_along_with_whatever_is_picked(tmp_path, planned):
    (tmp_path / "peers").mkdir()
    planned(Stage("wheels", (Part("wheels", 20, python("")),)), Stage("a", (Part("a", 20, python("")),)))
    assert call(tmp_path, "--only", "a", "--peers", str(tmp_path / "peers")) == 0
    assert parts.passed_in(tmp_path / "out")[1] == {"wheels", "a"}


def test_minutes_are_kept_to_the_second(tmp_path, planned):
    """From the start of the call, its own preparations included."""
    planned(Stage("a", (Part("a", 60, python("import time; time.sleep(60)")),)))
    begin = time.monotonic()
    assert call(tmp_path, minutes=5 / 60) == 1
    assert time.monotonic() - begin < 5


def test_parts_write_their_caches_and_temporary_files_under_build(tmp_path, planned):
    look = (
        "import os, sys, tempfile\n"
        "assert tempfile.gettempdir().startswith(sys.argv[1])\n"
        "for name in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'XDG_CACHE_HOME', 'CUDA_CACHE_PATH'):\n"
        "    assert os.environ[name].startswith(sys.argv[1] + '/gpu_cache'), name\n"
        "import sft_kernels\n"
        "assert sys.dont_write_bytecode"
    )
    planned(Stage("look", (Part("look", 30, python(look, tmp_path / "build")),)))
    assert call(tmp_path) == 0, (tmp_path / "out" / parts.SUMMARY).read_text()
    assert (tmp_path / "build" / "gpu_cache" / "triton_cache_dir").is_dir()  # the next call finds it again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5"], "no GPU: nvidia-smi finds none"),
        (["--minutes", "0", "--rehearse"], "--minutes: expected more than 0, got 0"),
        (["--minutes", "nan", "--rehearse"], "--minutes: expected more than 0, got nan"),
        (["--minutes", "5", "--rehearse", "--only", "smok"], "--only: no part is called smok; there are compile"),
        (["--minutes", "5", "--rehearse", "--after", "nowhere"], "--after: nowhere holds no results.tgz"),
        (["--minutes", "5", "--rehearse", "--peers", "nowhere"], "--peers: nowhere is no folder"),
    ],
)
def test_a_wrong_call_and_a_machine_without_gpu_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(on_gpu, "CACHE", tmp_path / "build" / "gpu_cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "build").exists()


def test_the_gpu_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.159.04, 9.0'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert on_gpu._gpu() == ("NVIDIA H100 80GB HBM3, driver 580.159.04", 90)


def test_a_rehearsal_from_end_to_end(tmp_path):
    """As a process of its own: a suite on the pretended GPU, whose file comes back in the archive."""
    command = [sys.executable, "-m", "bench.on_gpu", "--rehearse", "--out", tmp_path, "--minutes", "4"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "--only", "adamw", "smoke.adamw.torch"],
        cwd=on_gpu.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + (tmp_path / parts.SUMMARY).read_text()
    with tarfile.open(tmp_path / parts.ARCHIVE) as archive:
        (name,) = (n for n in archive.getnames() if n.startswith("adamw_a-pretended-gpu_") and n.endswith(".json"))
        suite = json.load(archive.extractfile(name))
        rows = json.load(archive.extractfile("smoke.adamw.torch.json"))["rows"]
    assert suite["device"]["type"] == "cuda"
    assert suite["rehearsal"]
    ours = suite["cells"][0]["rows"]["ours"]
    assert ours["error"] <= 1
    assert len(ours["host_seconds"]) == len(ours["seconds"]) == 2
    assert {row["verdict"] for row in rows} == {"ok"}
