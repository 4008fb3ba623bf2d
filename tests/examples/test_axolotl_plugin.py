import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .harness import FOLDER, assert_alike

pytest.importorskip("axolotl", reason="the plug-in is for axolotl, which is not installed")


@pytest.mark.parametrize(("options", "calls"), [((), 10), (("lora",), 20)], ids=["whole model", "lora"])
def test_it_trains_as_stock(options, calls, tmp_path):
    command = [sys.executable, "-m", "tests.examples.axolotl_run", str(tmp_path), *options]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(FOLDER), str(root)])
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert_alike(found["ours"], found["stock"], [found["harmless"]])
    assert found["counts"] == (calls, 10, 0)
    assert found["optimizer"] == "sft_kernels.ops.adamw.api"
    assert found["clip"] == (1.0, 0.0)
