"""The shapes of Llama 3, for a model of which only the number of parameters is known."""

import math
from typing import NamedTuple

TOKENS, _KEY_HEADS = 128256, 8


class Llama3(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    head_size: int
    tied: bool = False

    @property
    def of_a_layer(self):
        """Parameters of a layer: four projections of attention, three of the FFN, two norms."""
        attention = 2 * (self.heads + _KEY_HEADS) * self.head_size
        return self.hidden * (attention + 3 * self.intermediate + 2)

    @property
    def outside(self):
        """Parameters of the embeddings, the head and the last norm."""
        return self.hidden * (TOKENS * (1 if self.tied else 2) + 1)

    @property
    def parameters(self):
        return self.outside + self.layers * self.of_a_layer

    def config(self):
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=TOKENS,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=_KEY_HEADS,
            head_dim=self.head_size,
            tie_word_embeddings=self.tied,
        )


PUBLISHED = (
    Llama3("Llama 3.2 1B", 2048, 8192, 16, 32, 64, tied=True),
    Llama3("Llama 3.2 3B", 3072, 8192, 28, 24, 128, tied=True),
    Llama3("Llama 3.1 8B", 4096, 14336, 32, 32, 128),
    Llama3("Llama 3.1 70B", 8192, 28672, 80, 64, 128),
    Llama3("Llama 3.1 405B", 16384, 53248, 126, 128, 128),
)


def nearest(parameters):
    """Returns ``(shape, published)``.

    ``published`` is the one nearest in log size, ``shape`` the same with as many layers as come
    closest to ``parameters``.
    """
    published = min(PUBLISHED, key=lambda shape: abs(math.log(shape.parameters / parameters)))
    layers = round((parameters - published.outside) / published.of_a_layer)
    if layers < 1:
        least = published.outside + published.of_a_layer
        raise ValueError(
            f"params: expected at least {least:.3g}, which is {published.name} with one layer; "
            "give --model a config of a smaller model"
        )
    return published._replace(layers=layers), published
