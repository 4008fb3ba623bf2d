import json
import re

from sft_kernels.sft import demo


def questions(path):
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def test_no_held_out_list_of_words_is_seen_in_training(tmp_path):
    data = demo.write_data(tmp_path, seed=0, lists=300, held_out=60)
    asked = {q.split(": ")[1] for q in questions(data["held_out"])}
    seen = {q.split(": ")[1] for q in questions(data["chats"])}
    prose = [json.loads(line)["text"] for line in data["base"].read_text().splitlines()]
    assert len(asked) == 60
    assert not asked & seen
    assert not any(re.search(rf"(^|\. ){words} once more", text) for words in asked for text in prose)


def test_every_answer_is_right_for_its_question():
    tasks = demo._tasks(["red", "blue", "tan"], 1)
    assert {name: reply for name, (_, reply, _) in tasks.items()} == {
        "repeat": "red blue tan",
        "reverse": "tan blue red",
        "first": "red",
        "last": "tan",
        "count": "three",
        "next": "tan",
    }
    assert tasks["next"][0] == "Word after blue in: red blue tan"


def test_the_demo_runs_from_nothing_and_again(tmp_path):
    for _ in range(2):
        before, after = demo.run(str(tmp_path / "demo"), base_steps=2, steps=2, lists=60, held_out=12)
        assert before.keys() == after.keys() == {"masked loss", "exact match", "answers that stop"}
        assert after["masked loss"] < before["masked loss"]
    assert (tmp_path / "demo" / "tuned" / "curves.png").is_file()
