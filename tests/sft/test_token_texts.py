"""Tokens as HTML in which everything is seen."""

from sft_kernels.sft.token_texts import TokenTexts, plain, visible


def test_the_texts_of_byte_level_tokens_are_their_bytes(tokenizer):
    words = "red  blue\n\té中👩‍👩 \x07\x00é"
    texts = TokenTexts(tokenizer)
    found = [texts(token) for token in tokenizer(words)["input_ids"]]
    assert b"".join(text.encode(errors="surrogateescape") for text in found) == words.encode()
    assert texts(tokenizer.eos_token_id) == "<|endoftext|>"
    half = next(text for text in found if not text.isprintable() and "\udce4" in text)  # 中 is E4 B8 AD
    assert visible(half).startswith("<b>0xE4</b>")
    assert plain(half).startswith("\\xe4")


def test_the_texts_of_sentencepiece_tokens_keep_their_space():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "▁red", "s", "<0xE4>", "<0xB8>", "▁"]
    for steps, byte in (
        ([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)], "\udce4"),
        ([decoders.Metaspace()], "<0xE4>"),
    ):
        made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
        made.decoder = decoders.Sequence(steps)
        texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
        assert [texts(i) for i in range(6)][1:4] == [" red", "s", byte]
        assert texts(5) == " "
        assert texts(0) == "<unk>"


def test_everything_in_a_token_is_visible():
    assert visible("a\n b") == "a<b>⏎</b>\n<i> </i>b"
    assert visible("\u0301") == "◌\u0301"
    assert visible("\u00a0\x7f") == "<b>U+00A0</b><b>U+007F</b>"
    assert visible("") == "<b>empty</b>"
