"""Names of folders: what is not there, what is on the hub, and that nothing else asks the hub."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from sft_kernels.cli import main
from sft_kernels.sft import folders, hub
from sft_kernels.sft.loading import check_recipe, load_model, load_tokenizer
from sft_kernels.sft.recipe import Recipe

from .conftest import chat
from .small import model_of, same_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["out/rnu", "owner/name", "https://x.test/a", "a\0b", "a\nb", "HF:a/b"])
def test_a_folder_that_is_not_there_is_said_so(name):
    shown = name if name.isprintable() else repr(name)
    for load, argument in ((load_tokenizer, "tokenizer"), (lambda name: load_model(name, "cpu"), "model")):
        with pytest.raises(FileNotFoundError) as caught:
            load(name)
        assert str(caught.value) == f"{argument}: no such folder: {shown}"


def test_the_command_says_so_in_one_line(write_jsonl, tmp_path, capsys):
    data = write_jsonl(chat("a", "b"))
    assert main(["inspect", str(data), "--tokenizer", "out/rnu"]) == 1
    assert capsys.readouterr().err == "sft-kernels: tokenizer: no such folder: out/rnu\n"
    out, bad = tmp_path / "run", write_jsonl("{", name="bad.jsonl")
    assert main(["train", "--data", str(bad), "--model", "out/rnu", "--out", str(out)]) == 1
    assert capsys.readouterr().err == "sft-kernels: model: no such folder: out/rnu\n"  # before the data are read
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["hf:", "hf:x", "hf:../x", "hf:a/..", "hf:a/b/c", "hf:/a/b", "hf:a--b/c", "hf:a/b.git", "hf:a/b@",
             "hf:a/b@../c", "hf:a/b\n", "hf:a/é", "hf:a b/c"]
)  # fmt: skip
def test_a_malformed_name_asks_nothing(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"is no hf:owner/name or hf:owner/name@revision"):
        folders.find(name, "model")


@pytest.fixture
def snapshots(monkeypatch):
    """Stands in for the hub: what it was asked for, and the folder or error that it gives."""
    hub._downloaded.cache_clear()
    asked, answers = [], []

    def download(repository, **options):
        asked.append((repository, options))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    yield asked, answers
    hub._downloaded.cache_clear()


def test_a_name_on_the_hub_becomes_a_folder(folder, tokenizer, snapshots):
    asked, answers = snapshots
    answers += [folder, folder]
    recipe = check_recipe(Recipe(data=["-"], model="hf:owner/name@v1"))
    assert recipe.model == recipe.tokenizer == str(folder)
    assert [repository for repository, _ in asked] == ["owner/name"] * 2
    assert {options["revision"] for _, options in asked} == {"v1"}
    assert not any("py" in p or "bin" in p for _, options in asked for p in options["allow_patterns"])
    assert same_weights(load_model("hf:owner/name@v1", "cpu"), model_of(len(tokenizer)))  # asked once
    answers += [folder]
    folders.find("hf:owner/name", "model", trust_remote_code=True)
    assert "*.py" in asked[-1][1]["allow_patterns"]


def test_a_repository_without_safetensors_is_no_config(folder, snapshots):
    (folder / "model.safetensors").unlink()
    snapshots[1].append(folder)
    with pytest.raises(ValueError, match="hf:owner/name holds no safetensors"):
        load_model("hf:owner/name", "cpu")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such repository"),
        ("RevisionNotFoundError", "no such revision"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_what_the_hub_answers_is_one_line(kind, reason, snapshots):
    error = getattr(huggingface_hub.errors, kind)
    snapshots[1].append(error.__new__(error))
    with pytest.raises(OSError, match=rf"^tokenizer: hf:owner/name cannot be had from the hub \(.*{reason}"):
        load_tokenizer("hf:owner/name")


def test_a_folder_asks_the_hub_nothing(folder, tmp_path):
    """Neither a valid folder nor one with the name of a base model in it, nor a config alone."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_POST = do_HEAD

        def log_message(self, *args):
            pass

    adapter = shutil.copytree(folder, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    script = (
        "import sys\nfrom sft_kernels.sft.model import load_model, load_tokenizer\n"
        "for load, name in [(f, n) for n in sys.argv[1:] for f in (load_tokenizer, lambda n: load_model(n, 'cpu'))]:\n"
        "    try: load(name)\n"
        "    except (ValueError, OSError) as error: print(error)\n"
        "    else: print('loaded')\n"
        "import huggingface_hub, urllib.request\n"
        "try: urllib.request.urlopen(huggingface_hub.constants.ENDPOINT + '/last')\n"
        "except Exception: pass\n"
    )
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PYTHONPATH": ROOT}
        names = [str(folder), str(adapter), str(bare), "owner/base"]
        done = subprocess.run([sys.executable, "-c", script, *names], env=env, capture_output=True, text=True)
    finally:
        server.shutdown()
    said = done.stdout.splitlines()
    assert said[:3] == ["loaded", "loaded", "loaded"]
    assert said[3].startswith(f"model: {adapter} holds an adapter")
    assert said[4:6] == [f"tokenizer: {bare} holds no tokenizer files, such as tokenizer.json", "loaded"]
    assert said[6:] == ["tokenizer: no such folder: owner/base", "model: no such folder: owner/base"]
    assert asked == ["/last"]  # by the script's last lines: the stand-in can be asked


def test_a_library_cannot_ask_behind_our_back(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub.unasked(), pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        huggingface_hub.HfApi(endpoint="http://127.0.0.1:9").model_info("owner/name")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
