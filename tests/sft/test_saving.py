import errno
import json
import os
import resource
import shutil
import tempfile

import pytest
import torch
from safetensors import SafetensorError

from sft_kernels.sft import model as models
from sft_kernels.sft import saving
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.saving import NotSaved, check_folder, check_room, rehearse, save
from sft_kernels.sft.train import train

from .small import loaded, model_of, recipe_in, same_weights


@pytest.fixture
def model(tokenizer):
    return model_of(len(tokenizer))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The system's folder for temporary files, of this test alone."""
    folder = tmp_path / "system" / "tmp"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def failing(real, *folders, error=SafetensorError):
    """``save_pretrained`` that fails in ``folders``; without any, everywhere."""

    def save_pretrained(path, **options):
        if not folders or any(path.is_relative_to(folder) for folder in folders):
            (path / "model.safetensors").write_bytes(b"half")
            raise error("I/O error:\nNo space left on device (os error 28)")
        return real(path, **options)

    return save_pretrained


def test_the_trial_leaves_an_empty_folder_and_writes_one_number_of_each_weight(model, tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(saving, "check_room", lambda folder, *sizes: asked.extend(sizes))
    rehearse(model, tokenizer, tmp_path / "a" / "run", end_of_turn=7)
    assert not list((tmp_path / "a" / "run").iterdir())
    assert model.generation_config.eos_token_id[-1] == 7
    weights = sum(p.numel() * 4 for p in model.parameters())
    save(model, tokenizer, tmp_path / "a" / "run" / "model")
    (size,) = (size for size in asked if size >= weights)
    written = (tmp_path / "a" / "run" / "model" / "model.safetensors").stat().st_size
    assert written <= size < written + 100 * len(model.state_dict())  # the file's header, too
    assert same_weights(loaded(tmp_path / "a" / "run" / "model"), model)


def not_json(model, tokenizer):
    model.config.odd = object()


def shared(model, tokenizer):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight


def sparse(model, tokenizer):
    model.register_buffer("holes", torch.eye(3).to_sparse())


def no_template(model, tokenizer):
    tokenizer.chat_template = "\ud800"


def no_saver(model, tokenizer):
    def fail(folder):
        raise Exception("File too large (os error 27)")  # as tokenizers raise it

    tokenizer.save_pretrained = fail


@pytest.mark.parametrize(
    ("spoil", "argument"),
    [(not_json, "model"), (shared, "model"), (sparse, "model"), (no_template, "tokenizer"), (no_saver, "tokenizer")],
)
def test_what_cannot_be_saved_is_refused_by_name_and_leaves_nothing(spoil, argument, model, tokenizer_with, tmp_path):
    tokenizer = tokenizer_with("{{ messages }}")
    spoil(model, tokenizer)
    with pytest.raises(ValueError, match=rf"^{argument}: .*cannot be saved in .*run \(.+\)$"):
        rehearse(model, tokenizer, tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_saved_once(tokenizer, tmp_path):
    model = model_of(len(tokenizer), tie_word_embeddings=True)
    rehearse(model, tokenizer, tmp_path / "run")
    save(model, tokenizer, tmp_path / "run" / "model")
    assert same_weights(loaded(tmp_path / "run" / "model"), model)


def test_a_model_without_a_generation_config_is_saved(model, tokenizer, tmp_path):
    model.generation_config = None
    model.can_generate = lambda: False
    rehearse(model, tokenizer, tmp_path / "run", end_of_turn=7)
    save(model, tokenizer, tmp_path / "run" / "model")


def test_a_file_in_the_way_is_refused(model, tokenizer, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^out: .* is not a folder"):
        check_folder(tmp_path / "run")
    with pytest.raises(NotADirectoryError, match=r"^out: cannot write into"):
        rehearse(model, tokenizer, tmp_path / "run" / "deeper")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


TOLD = ["train.jsonl", "speed.jsonl", "curves.png", "tensorboard"]
WRITTEN = [*TOLD, "model", "model-unfinished", "model-weights.pt", "model-unfinished-weights.pt"]
PARTIAL = ["model.partial", "model-unfinished.partial"]


@pytest.mark.parametrize("name", WRITTEN + PARTIAL)
@pytest.mark.parametrize("kind", ["a file", "a folder", "a link", "a link to nothing"])
def test_what_an_earlier_run_left_is_refused(name, kind, tmp_path):
    out = tmp_path / "run"
    (out / ".trial-abc").mkdir(parents=True)  # of a killed run; its name is never used again
    (out / "notes.txt").write_text("mine")
    check_folder(out)
    if kind == "a file":
        (out / name).write_text("mine")
    elif kind == "a folder":
        (out / name).mkdir()
    else:
        (out / name).symlink_to(tmp_path / "nowhere" if kind == "a link to nothing" else out / "notes.txt")
    with pytest.raises(FileExistsError, match=rf"^out: .*{name}{', ' + kind if 'link' in kind else ''}[,)]"):
        check_folder(out)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_run_refuses_what_it_would_write_before_it_reads(tmp_path):
    (tmp_path / "curves.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"curves\.png, a link to nothing"):
        train(Recipe(data=[str(tmp_path / "none.jsonl")], model="none", out=str(tmp_path)))


@pytest.mark.parametrize(
    ("spot", "error", "reason"),
    [
        ("", ValueError, "expected a folder"),
        ("a\0b", ValueError, "no path"),
        ("file", NotADirectoryError, "file is not a folder"),
        ("file/run", NotADirectoryError, "file is not a folder, so .*file/run cannot be made"),
        ("dangling", NotADirectoryError, "dangling is a link to nothing"),
        ("dangling/a/b", NotADirectoryError, "dangling is a link to nothing, so"),
        ("locked/run", PermissionError, "locked cannot be written to"),
        ("x" * 300, OSError, "File name too long"),
        ("x/" * 2000, ValueError, "at most 200 are supported"),
        ("new/a/b", None, ""),
        ("link", None, ""),
        ("link/run", None, ""),
    ],
)
def test_spots_where_no_folder_can_be(spot, error, reason, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may do anything
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in {spot, f"{tmp_path}/{spot}" if spot else ""}:
        if error is None:
            check_folder(name)
        else:
            with pytest.raises(error, match=f"^out: .*{reason}"):
                check_folder(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_home_that_no_shell_expanded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^out: ~/run is not expanded; give /home/me/run, or ./~/run"):
        check_folder("~/run")
    check_folder("./~/run")
    check_folder("run~")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_mode_that_the_umask_gives(mask, model, tokenizer, tmp_path, elsewhere, monkeypatch):
    run, full = tmp_path / "run", tmp_path / "full"
    before = os.umask(mask)
    try:
        train(recipe_in(tmp_path, steps=1), model=model, tokenizer=tokenizer)
        monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, full))
        with pytest.raises(NotSaved) as aside:
            save(model, tokenizer, full / "model")
        monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, error=ValueError))
        with pytest.raises(NotSaved) as weights:
            save(model, tokenizer, run / "other")
    finally:
        os.umask(before)
    assert weights.value.path.name == "other-weights.pt"
    assert aside.value.path.parents[1] == tmp_path
    saved = [path for top in (run, aside.value.path.parent) for path in (top, *top.rglob("*"))]
    assert {"curves.png", "train.jsonl", "model.safetensors", "tokenizer.json"} <= {path.name for path in saved}
    for path in saved:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_weights_are_not_written_through_a_link(model, tokenizer, tmp_path, elsewhere, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mine").write_text("mine")
    (run / "model-weights.pt").symlink_to(tmp_path / "mine")
    monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, error=ValueError))
    with pytest.raises(NotSaved, match="its weights are in") as e:
        save(model, tokenizer, run / "model")
    assert e.value.path.parent != run
    assert (tmp_path / "mine").read_text() == "mine"
    assert (run / "model-weights.pt").is_symlink()


def test_a_folder_that_cannot_be_written_keeps_its_kind_of_error(model, tokenizer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(PermissionError, match=r"^out: .*run \(Permission denied\)$"):
        rehearse(model, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_refused(model, tokenizer, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(OSError, match=r"^out: saving needs 4\.\d+ MiB in .*, and 1 MiB are free"):
        rehearse(model, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("aside", [True, False])
def test_a_limit_on_the_size_of_files_is_found(aside, tmp_path, monkeypatch):
    if not aside:
        monkeypatch.setattr(saving, "_set_aside", lambda descriptor, size: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no room for a file of .* \(File too large\)"):
            check_room(tmp_path, 1000, 50_000)
        check_room(tmp_path, 30_000, 30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_blocks_are_really_set_aside():
    """A quota counts them; a file that only has its length takes none."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        saving._set_aside(file.fileno(), 1 << 16)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 16


def test_a_quota_is_found(tmp_path, monkeypatch):
    def full(descriptor, size):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(saving, "_set_aside", full)
    with pytest.raises(OSError, match=r"\(Disk quota exceeded\)"):
        check_room(tmp_path, 1000)


def test_a_full_folder_sends_the_model_beside_it(model, tokenizer, tmp_path, elsewhere, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, run))
    with pytest.raises(
        NotSaved, match=r"could not be saved in .* \(I/O error: No space left .*\); it is whole in"
    ) as e:
        save(model, tokenizer, run / "model")
    assert e.value.path.parents[1] == tmp_path
    assert str(e.value.path) in str(e.value)
    assert same_weights(loaded(e.value.path), model)
    assert not list(run.iterdir())
    assert not list(elsewhere.iterdir())


def test_a_full_disk_sends_the_model_to_the_temporary_files(model, tokenizer, tmp_path, elsewhere, monkeypatch):
    disk = tmp_path / "disk"
    monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, disk))
    with pytest.raises(NotSaved) as e:
        save(model, tokenizer, disk / "run" / "model")
    assert e.value.path.parents[1] == elsewhere
    assert same_weights(loaded(e.value.path), model)
    assert [path.name for path in disk.iterdir()] == ["run"]


def test_the_weights_are_kept_if_the_tokenizer_cannot_be_saved(model, tokenizer_with, tmp_path, elsewhere):
    tokenizer = tokenizer_with("{{ messages }}")
    no_saver(model, tokenizer)
    with pytest.raises(NotSaved, match="its weights are in") as e:
        save(model, tokenizer, tmp_path / "run" / "model")
    assert e.value.path == tmp_path / "run" / "model.partial"
    assert same_weights(type(model).from_pretrained(e.value.path), model)
    assert not (tmp_path / "run" / "model").exists()


def test_the_weights_are_kept_if_transformers_cannot_save_them(model, tokenizer, tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained, error=ValueError))
    with pytest.raises(NotSaved, match="its weights are in") as e:
        save(model, tokenizer, tmp_path / "run" / "model")
    assert e.value.path == tmp_path / "run" / "model-weights.pt"
    kept = torch.load(e.value.path)
    assert all(kept[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model-weights.pt"]


def test_a_model_that_fits_nowhere_is_said_to_be_nowhere(model, tokenizer, tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(model, "save_pretrained", failing(model.save_pretrained))
    monkeypatch.setattr(torch, "save", failing(None))
    with pytest.raises(NotSaved, match="nor beside it, nor in") as e:
        save(model, tokenizer, tmp_path / "run" / "model")
    assert e.value.path is None
    assert "\n" not in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "system"]
    assert not list((tmp_path / "run").iterdir())


def test_what_another_run_is_saving_is_not_touched(model, tokenizer, tmp_path, elsewhere):
    (tmp_path / "run" / "model.partial").mkdir(parents=True)
    (tmp_path / "run" / "model.partial" / "x").write_text("")
    with pytest.raises(NotSaved, match="exists already"):
        save(model, tokenizer, tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model.partial" / "x").exists()


@pytest.mark.parametrize(("code", "fails"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EINVAL, False)])
def test_a_disk_that_is_full_only_when_waited_for_fails_the_save(code, fails, model, tokenizer, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    if fails:
        with pytest.raises(OSError, match=os.strerror(code)):
            models.save(model, tokenizer, tmp_path / "model")
    else:
        models.save(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model").exists() == (not fails)


@pytest.mark.parametrize("known", [None, 2, [2, 7], (2,), torch.tensor([2])], ids=str)
def test_an_answer_stops_at_the_end_of_a_turn_whatever_stopped_it_before(known, model):
    model.generation_config.eos_token_id = known
    models.stop_at(model, 7)
    expected = [7] if known is None else [2, 7]
    assert json.dumps(model.generation_config.eos_token_id) == json.dumps(expected)


def test_a_folder_that_lacks_weights_is_refused(model, tokenizer, tmp_path):
    """Random ones would pass for a download cut short."""
    save(model, tokenizer, tmp_path / "whole")
    assert same_weights(models.load_model(tmp_path / "whole", "cpu"), model)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config.update(num_hidden_layers=model.config.num_hidden_layers + 1, layer_types=None)
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model: .*whole lacks \d+ weights .*such as model\.layers\."):
        models.load_model(tmp_path / "whole", "cpu")
