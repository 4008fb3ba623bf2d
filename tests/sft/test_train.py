import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_kernels.sft import held_out, speed, state, stock
from sft_kernels.sft import model as models
from sft_kernels.sft import run as running
from sft_kernels.sft.data import DataError
from sft_kernels.sft.dataset import load_examples
from sft_kernels.sft.lr import cosine_factor
from sft_kernels.sft.masking import Encoder
from sft_kernels.sft.packing import collate
from sft_kernels.sft.recipe import Recipe
from sft_kernels.sft.stock import NotStock, check_against_stock
from sft_kernels.sft.train import train

from .conftest import REAL_DATA, chat

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY_CONFIG = str(Path(__file__).parents[1] / "recipes" / "tiny_llama.json")


@pytest.fixture
def small_model(tokenizer):
    """A random model of any architecture, attending as the trainer's do."""
    import transformers

    from sft_kernels.integrations import attention

    def make(kind="llama", **options):
        attention.register()
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SMALL, **options})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
        return model

    return make


@pytest.fixture
def chats(write_jsonl):
    """Conversations of very different length, so that micro-batches keep very different numbers of tokens."""
    return write_jsonl(*(chat("How many? " + "red " * (i % 7), "word " * (1 + i % 11)) for i in range(40)))


@pytest.fixture
def recipe(chats, tmp_path):
    return Recipe(data=[str(chats)], out=str(tmp_path / "run"), row_tokens=128, lr=1e-2, steps=4, precision="fp32")


def steps_of(out):
    with open(f"{out}/train.jsonl") as file:
        return [row for line in file if "loss" in (row := json.loads(line))]


def test_a_run_leaves_a_log_curves_and_a_model_that_loads(recipe, small_model, tokenizer):
    import transformers

    recipe = replace(recipe, holdout=0.1, eval_every=2)
    trained, _, log = train(recipe, model=small_model(), tokenizer=tokenizer)
    rows = steps_of(recipe.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == {
        "step", "loss", "lr", "grad_norm", "examples", "rows", "tokens", "padding", "kept", "skipped_steps",
    }  # fmt: skip
    assert [row["step"] for row in log.history if "eval" in row] == [0, 2, 4]
    with open(f"{recipe.out}/curves.png", "rb") as image:
        assert image.read(8) == b"\x89PNG\r\n\x1a\n"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{recipe.out}/model")
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.use_cache
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.generation_config.eos_token_id
    for a, b in zip(loaded.parameters(), trained.parameters(), strict=True):
        assert a.equal(b)
    assert transformers.AutoTokenizer.from_pretrained(f"{recipe.out}/model").chat_template == tokenizer.chat_template


def test_a_line_has_the_numbers_of_its_own_step_however_often_they_are_read(recipe, small_model, tokenizer):
    recipe = replace(recipe, steps=7)
    runs = []
    for every in (1, 3, 10):
        out = f"{recipe.out}{every}"
        train(replace(recipe, log_every=every, out=out), model=small_model(), tokenizer=tokenizer)
        runs.append(steps_of(out))
    assert runs[0] == runs[1] == runs[2]
    assert len({row["loss"] for row in runs[0]}) == 7
    assert [type(runs[0][0][name]) for name in ("loss", "grad_norm", "skipped_steps")] == [float, float, int]


def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(recipe, small_model, tokenizer, monkeypatch, capsys):
    """Without a number read: the third step's loss is NaN."""
    calls, loss = [], running.linear_cross_entropy

    def spoilt(*args, **kwargs):
        calls.append(None)
        return loss(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(running, "linear_cross_entropy", spoilt)
    train(replace(recipe, steps=5), model=small_model(), tokenizer=tokenizer)
    rows = steps_of(recipe.out)
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert "5, of them 1 skipped" in capsys.readouterr().out


def test_the_schedule_advances_once_per_optimiser_step(recipe, small_model, tokenizer):
    recipe = replace(recipe, accumulate=3, steps=6, warmup=0.34)
    train(recipe, model=small_model(), tokenizer=tokenizer)
    assert [row["lr"] for row in steps_of(recipe.out)] == [
        pytest.approx(1e-2 * cosine_factor(t, 6, 2)) for t in range(6)
    ]


def test_accumulation_has_one_denominator(recipe, small_model, tokenizer):
    """Ragged micro-batches of one row give the step that one batch of all rows gives."""
    whole, parts = small_model(), small_model()
    train(replace(recipe, rows=4, out=recipe.out + "1"), model=whole, tokenizer=tokenizer)
    train(replace(recipe, rows=1, accumulate=4, out=recipe.out + "2"), model=parts, tokenizer=tokenizer)
    for a, b in zip(steps_of(recipe.out + "1"), steps_of(recipe.out + "2"), strict=True):
        assert a["kept"] == b["kept"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_logged_loss_is_the_mean_over_the_kept_tokens(recipe, small_model, tokenizer):
    """Against the stock model, an example at a time, before the first update."""
    model = small_model()
    examples, _ = load_examples(recipe.data, Encoder(tokenizer), 128)
    total = kept = 0
    for e in examples:
        ids, labels = torch.tensor([e.input_ids]), torch.tensor([e.labels])
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logits = model(ids).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)
        kept += e.kept
    model.set_attn_implementation("sft_kernels")
    train(replace(recipe, rows=100, steps=1), model=model, tokenizer=tokenizer)
    (row,) = steps_of(recipe.out)
    assert (row["kept"], row["examples"]) == (kept, 40)
    assert row["loss"] == pytest.approx(float(total) / kept, rel=1e-5)


def test_examples_can_weigh_the_same(recipe, small_model, tokenizer):
    model = small_model()
    examples, _ = load_examples(recipe.data, Encoder(tokenizer), 128)
    means = []
    for e in examples:
        batch = collate([[e]], len(e.input_ids), 0)
        with torch.no_grad():
            logits = model.lm_head(models.hidden_states(model, batch))[0]
        means.append(torch.nn.functional.cross_entropy(logits[batch.kept.rows], batch.kept.targets))
    train(replace(recipe, rows=100, steps=1, weigh="examples"), model=model, tokenizer=tokenizer)
    assert steps_of(recipe.out)[0]["loss"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)


def test_the_update_is_clipped(recipe, small_model, tokenizer):
    """AdamW hides a gradient's scale but for eps; a clip far under eps shrinks the update, one far over does not."""
    moved = []
    for name, bound in (("a", 1e-12), ("b", 1e3)):
        model = small_model()
        before = model.lm_head.weight.detach().clone()
        train(
            replace(recipe, steps=1, weight_decay=0, max_grad_norm=bound, out=recipe.out + name),
            model=model,
            tokenizer=tokenizer,
        )
        moved.append(float((model.lm_head.weight.detach() - before).norm()))
        assert steps_of(recipe.out + name)[0]["grad_norm"] > 0.01
    assert moved[0] < 1e-2 * moved[1]


def test_the_same_seed_gives_the_same_run(recipe, small_model, tokenizer):
    for name in "ab":
        train(replace(recipe, out=recipe.out + name), model=small_model(), tokenizer=tokenizer)
    assert steps_of(recipe.out + "a") == steps_of(recipe.out + "b")


def test_bf16_autocast_stays_close_to_fp32(recipe, small_model, tokenizer):
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "out": recipe.out + precision, "lr": 1e-3}
        train(replace(recipe, **options), model=small_model(), tokenizer=tokenizer)
    for full, half in zip(steps_of(recipe.out + "fp32"), steps_of(recipe.out + "bf16"), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=2e-2)
        assert half["loss"] != full["loss"]


def test_every_epoch_sees_every_example_once(recipe, small_model, tokenizer):
    train(replace(recipe, steps=None, epochs=2), model=small_model(), tokenizer=tokenizer)
    assert sum(row["examples"] for row in steps_of(recipe.out)) == 80


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 8}),
        ("gpt2", {"attn_pdrop": 0.0, "n_positions": 512}),
        ("gemma2", {"final_logit_softcapping": 0.05, "attn_logit_softcapping": 0.02, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("phi", {"partial_rotary_factor": 0.5}),  # a head with a bias
    ],
)
def test_models_that_the_losses_and_the_attention_carry_pass_the_check(kind, options, small_model, tokenizer, chats):
    model = small_model(kind, **options)
    for name, p in model.named_parameters():
        if "bias" in name:  # they start at zero
            torch.nn.init.normal_(p, std=0.5)
    examples, _ = load_examples([chats], Encoder(tokenizer), 128)
    batch = collate([examples[:6], examples[6:9]], 400, 0)
    check_against_stock(model.eval(), batch)
    with torch.no_grad():
        checked = models.hidden_states(model, batch)
        with models.boundaries_given(model):
            assert models.hidden_states(model, batch).equal(checked)
    assert model.config._attn_implementation == "sft_kernels"
    assert all(p.grad is None for p in model.parameters())


def test_a_model_with_another_attention_keeps_it(small_model):
    model = small_model("llama")
    model.set_attn_implementation("sdpa")
    with models.boundaries_given(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "options", "left_out"),
    [
        ("gemma2", {"final_logit_softcapping": 0.05, "attn_logit_softcapping": None, "head_dim": 8}, "softcap"),
        ("cohere", {"logit_scale": 0.0625}, "logit_scale"),
        ("granite", {"logits_scaling": 8.0}, "logit_scale"),
        ("phi", {"partial_rotary_factor": 0.5}, "linear_bias"),
    ],
)
def test_a_trainer_that_left_out_what_a_head_does_would_be_found_out(
    kind, options, left_out, small_model, tokenizer, chats, monkeypatch
):
    model = small_model(kind, **options)
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p, std=0.5)
    monkeypatch.setattr(stock, "head", lambda model: models.head(model) | {left_out: None})
    examples, _ = load_examples([chats], Encoder(tokenizer), 128)
    with pytest.raises(NotStock):
        check_against_stock(model, collate([examples[:6]], 400, 0))


def test_a_model_that_does_something_else_to_its_logits_stops_the_run_with_the_reason(
    recipe, small_model, tokenizer, tmp_path
):
    model = small_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    model.config.lm_head_multiplier = 2.0
    with pytest.raises(NotStock, match=r"does something else to its logits.*lm_head_multiplier=2.0"):
        train(recipe, model=model, tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_a_model_whose_examples_see_each_other_stops_the_run(recipe, small_model, tokenizer, monkeypatch):
    from sft_kernels.integrations import attention

    def leaky(query, key, value, cu_seqlens, max_seqlen, **options):
        return real(query, key, value, cu_seqlens[[0, -1]], None, **options)

    real = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", leaky)
    with pytest.raises(NotStock, match=r"packed loss|gradient of"):
        train(recipe, model=small_model(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("mixtral", {"output_router_logits": True, "num_local_experts": 2}, "output_router_logits"),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0}, "OPTForCausalLM|attn|cu_seq_lens_q"),
    ],
)
def test_what_the_trainer_does_not_compute_is_refused(kind, options, reason, recipe, small_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=reason):
        train(recipe, model=small_model(kind, **options), tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assis', ":2: not JSON"),
        (chat("long", "word " * 200), ":2: .* tokens, longer than the row of 128"),
        ({"messages": [{"role": "user", "content": "a"}]}, ":2: no assistant turn"),
        ({"text": "prose"}, ":2: .*no assistant turn"),
    ],
)
def test_bad_data_stops_the_run_before_anything_is_written(
    line, reason, recipe, write_jsonl, small_model, tokenizer, tmp_path
):
    path = write_jsonl(chat("a", "b"), line, name="bad.jsonl")
    recipe = replace(recipe, data=[str(path)])
    with pytest.raises(DataError, match=reason):
        train(recipe, model=small_model(), tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_bad_lines_can_be_skipped_and_are_reported(recipe, write_jsonl, small_model, tokenizer, capsys):
    path = write_jsonl(chat("a", "b"), "{", chat("long", "word " * 200), chat("c", "d"), name="bad.jsonl")
    train(replace(recipe, data=[str(path)], steps=1, skip_bad=True), model=small_model(), tokenizer=tokenizer)
    said = capsys.readouterr().out
    assert "bad.jsonl:2: not JSON" in said
    assert "bad.jsonl:3: " in said
    assert "skipped 2 lines, 2 are left" in said


def test_a_model_with_attention_of_its_own_is_refused(recipe, tokenizer, tmp_path):
    config = tmp_path / "falcon.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "falcon",
                "vocab_size": 300,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
        )
    )
    with pytest.raises(ValueError, match="FalconForCausalLM, which computes its attention itself"):
        train(replace(recipe, model=str(config)), tokenizer=tokenizer)


def test_a_folder_without_its_weights_is_no_config(recipe, small_model, tokenizer, tmp_path):
    train(replace(recipe, steps=1), model=small_model(), tokenizer=tokenizer)
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model"):
        train(replace(recipe, model=str(tmp_path / "run" / "model"), out=recipe.out + "2"))


def test_a_folder_of_an_earlier_run_trains_on(recipe, small_model, tokenizer, tmp_path):
    train(replace(recipe, steps=3), model=small_model(), tokenizer=tokenizer)
    train(replace(recipe, model=str(tmp_path / "run" / "model"), out=recipe.out + "2", steps=1))
    assert steps_of(recipe.out + "2")[0]["loss"] < steps_of(recipe.out)[0]["loss"]


def test_a_run_is_never_overwritten(recipe, small_model, tokenizer):
    train(replace(recipe, steps=1), model=small_model(), tokenizer=tokenizer)
    before = steps_of(recipe.out)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(recipe, model=small_model(), tokenizer=tokenizer)
    assert steps_of(recipe.out) == before


@pytest.mark.parametrize(
    "change",
    [
        {"data": []},
        {"model": ""},
        {"rows": 0},
        {"steps": 0},
        {"steps": None, "epochs": 0},
        {"steps": None, "epochs": float("inf")},
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"lr": -1e-3},
        {"weight_decay": float("nan")},
        {"max_grad_norm": -1.0},
        {"eval_every": -1},
        {"seed": -1},
        {"seed": 1 << 64},
        {"warmup": 1.5},
        {"holdout": 1.0},
        {"max_grad_norm": 0.0},
        {"mask": "none"},
        {"precision": "fp16"},
        {"parameters": "bf16"},
        {"parameters": "bf16+master", "precision": "fp32"},
        {"save_every": -1},
        {"keep": 0},
        {"max_skips": 0},
        {"spike": 1.0},
        {"spike": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"neftune_alpha": -1.0},
        {"neftune_alpha": float("inf")},
        {"metric_prompts": -1},
        {"max_new_tokens": 0},
        {"metric": "no name"},
        {"init_from": "somewhere"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_option_out_of_range_is_named_before_the_data_are_read(change, recipe):
    with pytest.raises(ValueError, match=f"^{list(change)[-1]}: "):
        train(replace(recipe, **{"data": ["nowhere.jsonl"], "model": "x", **change}))


def test_a_tokenizer_larger_than_the_model_is_refused(recipe, tokenizer, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "vocab_size": 290, **SMALL}))
    with pytest.raises(ValueError, match="the model embeds 290"):
        train(replace(recipe, model=str(config)), tokenizer=tokenizer)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real conversations beside the project")
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "toolcall_multiturn.jsonl"])
def test_real_conversations_train_from_a_config(name, tmp_path):
    lines = (REAL_DATA / name).read_text().splitlines(keepends=True)[:200]
    data = tmp_path / name
    data.write_text("".join(lines))
    recipe = Recipe(
        data=[str(data)],
        model=TINY_CONFIG,
        out=str(tmp_path / "run"),
        row_tokens=4096,
        steps=12,
        lr=3e-3,
        warmup=0.2,
        holdout=0.05,
        max_new_tokens=8,
    )
    _, _, log = train(recipe)
    before, after = (row["eval"]["loss"] for row in log.history if "eval" in row)
    assert before == pytest.approx(math.log(2048), rel=0.1)
    assert after < before - 1


def test_padding_is_what_no_example_fills(recipe, small_model, tokenizer):
    _, _, log = train(replace(recipe, accumulate=2, steps=None), model=small_model(), tokenizer=tokenizer)
    examples, _ = load_examples(recipe.data, Encoder(tokenizer), recipe.row_tokens)
    rows = steps_of(recipe.out)  # of one epoch
    assert sum(row["examples"] for row in rows) == len(examples)
    assert all(row["tokens"] == 128 * row["rows"] and row["padding"] >= 0 for row in rows)
    assert sum(row["tokens"] - row["padding"] for row in rows) == sum(len(e.input_ids) for e in examples)
    assert [row["tokens"] for row in log.speed.rows] == [sum(row["tokens"] for row in rows)]


def test_measurements_and_checkpoints_are_no_training_time(recipe, small_model, tokenizer, monkeypatch):
    now = [0.0]

    def takes(seconds, module, name):
        function = getattr(module, name)

        def timed(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, timed)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    takes(1.0, running, "linear_cross_entropy")
    takes(100.0, held_out, "masked_loss")
    takes(100.0, state, "write")
    recipe = replace(recipe, holdout=0.1, eval_every=1, save_every=3, metric_prompts=0, steps=5)
    _, _, log = train(recipe, model=small_model(), tokenizer=tokenizer)
    assert [(row["step"], row["seconds"]) for row in log.speed.rows] == [(step, 1.0) for step in range(1, 6)]
