"""Every chat template that trl installs, on seven kinds of conversation: are the labels what the assistant says?

``python -m bench.census_templates [--out FILE] [--only NAME …]``. Every turn, thinking and argument has a word of its
own. A conversation is right if all the words of the assistant's carry loss, each once for its turn, and no other word
does. It is split if it is right only with ``split_turns``, and refused, with the reason, if neither gives labels. The
exit status is 1 if labels are wrong, 2 for a wrong call.
"""

import argparse
import collections
import copy
import re
import sys
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from sft_kernels.sft.masking import IGNORE, Encoder
from sft_kernels.sft.model import train_tokenizer
from sft_kernels.sft.rows import DataError, Record

from .facts import code_state, publish, versions

# What tokenizers of these templates hold as special tokens.
_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|\[/?[A-Z_]{3,}\]|</s>|<[a-z]+_of_[a-z]+>|<\|[a-z_]+>|<[a-z_]+\|>"
)


class Kind(NamedTuple):
    """A conversation, its tools, and the words that must carry loss."""

    messages: list
    words: list
    tools: list | None = None


def _user(word):
    return {"role": "user", "content": f"User {word}."}


def _said(word, thought=None):
    message = {"role": "assistant", "content": f"Said {word}."}
    return message if thought is None else {**message, "reasoning_content": f"Thought {thought}."}


_INLINE = {"role": "assistant", "content": "<think>\nThought tone.\n</think>\n\nSaid aone."}
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
_FUNCTION = {"name": "toolname", "description": "The weather.", "parameters": {**_PARAMETERS, "required": ["city"]}}
_CALL = {"type": "function", "id": "call00001", "function": {"name": "toolname", "arguments": {"city": "argone"}}}
_TOOL_CALL = [
    _user("uone"),
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "toolname", "tool_call_id": "call00001", "content": "Result rone."},
    _said("atwo"),
]

KINDS = {
    "one turn": Kind([_user("uone"), _said("aone")], ["aone"]),
    "system": Kind([{"role": "system", "content": "System sone."}, _user("uone"), _said("aone")], ["aone"]),
    "three turns": Kind(
        [_user("uone"), _said("aone"), _user("utwo"), _said("atwo"), _user("uthree"), _said("athree")],
        ["aone", "atwo", "athree"],
    ),
    "thinking as a field": Kind([_user("uone"), _said("aone", "tone")], ["aone", "tone"]),
    "thinking inline": Kind([_user("uone"), _INLINE], ["aone", "tone"]),
    "thinking in two turns": Kind(
        [_user("uone"), _said("aone", "tone"), _user("utwo"), _said("atwo", "ttwo")], ["aone", "tone", "atwo", "ttwo"]
    ),
    "tool call": Kind(_TOOL_CALL, ["toolname", "argone", "atwo"], [{"type": "function", "function": _FUNCTION}]),
}
_NOT_SAID = ("sone", "uone", "utwo", "uthree", "rone")


class Verdict(NamedTuple):
    verdict: str  # right, split, refused, not rendered, WRONG
    reason: str = ""


def names():
    """The templates of the installed trl, in order."""
    folder = files("trl") / "chat_templates"
    return sorted(path.name.removesuffix(".jinja") for path in folder.iterdir() if path.name.endswith(".jinja"))


def tokenizer_for(name, trained):
    """A copy of the tokenizer ``trained`` with trl's template ``name`` and the special tokens that stand in it."""
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(trained)
    special = sorted({"<|im_start|>", "<|im_end|>", *_SPECIAL.findall(template)})
    tokenizer.add_special_tokens(
        {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>", "extra_special_tokens": special}
    )
    tokenizer.chat_template = template
    return tokenizer


def trained():
    """A byte-level BPE that knows the words of all kinds."""
    return train_tokenizer([str(kind) for kind in KINDS.values()] * 4, 600)


def examine(tokenizer, kind):
    """The :class:`Verdict` on one conversation."""
    kind = KINDS[kind]
    try:
        tokenizer.apply_chat_template(kind.messages, tools=kind.tools, tokenize=False)
    except Exception as error:  # templates are programs: they raise anything
        return Verdict("not rendered", str(error).splitlines()[0])
    record = Record("chats.jsonl", 1, kind.messages, None, kind.tools)
    reasons = []
    for verdict, split in (("right", False), ("split", True)):
        try:
            examples = Encoder(tokenizer, split_turns=split).examples(record)
        except (DataError, ValueError) as error:
            reasons.append(str(error).removeprefix("chats.jsonl:1: "))
            continue
        fault = _fault(tokenizer, examples, kind.words)
        return Verdict("WRONG", fault) if fault else Verdict(verdict, "".join(reasons))
    return Verdict("refused", reasons[-1])


def _fault(tokenizer, examples, words):
    """Says which word lacks loss or has it by mistake; "" if none."""
    runs = [
        tokenizer.decode([token for token, label in zip(e.input_ids, e.labels, strict=True) if label != IGNORE])
        for e in examples
    ]
    counts = {word: sum(word in run for run in runs) for word in (*words, *_NOT_SAID)}
    missing = [word for word in words if counts[word] != 1]
    extra = [word for word in _NOT_SAID if counts[word]]
    return f"not once: {missing}, not to be learned: {extra}" if missing or extra else ""


def summary(found):
    """The counts of ``found``, ``{(template, kind): Verdict}``, in one line."""
    counts = collections.Counter(verdict.verdict for verdict in found.values())
    verdicts = ("right", "split", "refused", "not rendered", "WRONG")
    return f"{len(found)} conversations: {', '.join(f'{counts[verdict]} {verdict}' for verdict in verdicts)}"


def page(found):
    """The census as Markdown."""
    commit, changed = code_state()
    lines = [
        f"# Chat templates of trl {versions()['trl']}",
        "",
        f"{summary(found)}.",
        "",
        f"Written by `python -m bench.census_templates` at commit {(commit or 'unknown')[:12]}"
        f"{' with changes' if changed else ''}, transformers {versions()['transformers']}.",
        "Right: every word of the assistant's carries loss once, and no other word does.",
        "Split: refused as one example for the reason given, right with `--split-turns`.",
        "Refused: the template leaves out or contradicts what the model would have to say.",
        "Not rendered: the template itself raises.",
        "",
        f"| template | {' | '.join(KINDS)} |",
        f"|---|{'---|' * len(KINDS)}",
    ]
    reasons = {}
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for kind in KINDS:
            verdict, reason = found[name, kind]
            number = f" {reasons.setdefault(reason, len(reasons) + 1)}" if reason else ""
            cells.append(verdict + number)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", "", *(f"{number}. `{reason}`" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.census_templates", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: in bench/results, of all)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), help="these; printed without --out")
    parsed = parser.parse_args(argv)
    code_state()
    tokenizer, found = trained(), {}
    for name in parsed.only or names():
        of_template = tokenizer_for(name, tokenizer)
        found |= {(name, kind): examine(of_template, kind) for kind in KINDS}
    publish(parsed, f"census_templates_trl_{versions()['trl']}.md", page(found))
    print(summary(found), file=sys.stderr)
    return int(any(verdict.verdict == "WRONG" for verdict in found.values()))


if __name__ == "__main__":
    sys.exit(main())
