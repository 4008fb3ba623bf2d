import copy

import pytest

from sft_kernels.sft.generation import move_from_model_config, saveable

from .small import model_of


def config(**values):
    from transformers import GenerationConfig

    made = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3])
    for name, value in values.items():  # as from_pretrained does, without a word
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),  # Llama 2
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"min_p": 0.1, "max_new_tokens": 0}, {"do_sample": True, "min_p": 0.1, "max_new_tokens": None}),
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.0, "top_p": 0.5}, {"do_sample": None, "temperature": None, "top_p": None}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": None, "length_penalty": None}),
        ({"pad_token_id": -1}, {"pad_token_id": 7}),
        ({"cache_implementation": "none such"}, {"cache_implementation": None}),
        ({"num_return_sequences": 3}, {"num_return_sequences": None}),
        ({"output_scores": True, "max_new_tokens": 9}, {"output_scores": None, "max_new_tokens": 9}),
        ({"suppress_tokens": [5], "forced_eos_token_id": 5, "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"streamer": "x", "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"odd": object()}, {}),
    ],
)
def test_a_config_that_transformers_refuses_is_changed_as_little_as_possible(values, expected, tmp_path):
    given = config(**values)
    with pytest.raises(Exception, match=r"."):
        given.save_pretrained(tmp_path)
    before = dict(given.__dict__)
    changed, line = saveable(given, tmp_path, pad_token_id=7)
    assert given.__dict__ == before
    assert "\n" not in line
    assert ("do_sample is now True" in line) == (expected.get("do_sample") is True)
    changed.save_pretrained(tmp_path)
    read = type(given).from_pretrained(tmp_path)
    assert (read.bos_token_id, read.eos_token_id) == (1, [2, 3])
    assert {name: getattr(read, name) for name in expected} == expected


def test_a_config_that_transformers_saves_is_left_alone(tmp_path):
    given = config(do_sample=True, temperature=0.7)
    assert saveable(given, tmp_path) == (given, None)


def test_an_unchanged_published_config_is_left_alone(tmp_path):
    """transformers saves it back as it was read."""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 2}')
    from transformers import GenerationConfig

    given = GenerationConfig.from_pretrained(tmp_path)
    changed, line = saveable(given, tmp_path)
    assert changed is given
    assert line is None


def test_values_of_generation_leave_the_config_of_the_model(tmp_path):
    model = model_of(40)
    model.config.temperature, model.config.top_k = 0.5, 9
    model.generation_config.top_k = 4
    with pytest.raises(ValueError, match="generation parameters"):
        copy.deepcopy(model).save_pretrained(tmp_path)
    assert "temperature=0.5" in move_from_model_config(model)
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.5, 4)
    model.config.save_pretrained(tmp_path)
    assert not move_from_model_config(model)
