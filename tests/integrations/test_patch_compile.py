"""A patched model under ``torch.compile``: a graph ends at the head, and begins again at most a few times."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from sft_kernels.integrations import head_counts, patch

from .models import V, assert_alike, llama, train

ForCausalLMLoss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
CausalLMOutput = pytest.importorskip("transformers.modeling_outputs").CausalLMOutput

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch's own
    pytest.mark.skipif(not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run here"),
]

SHAPES = [(2, 9), (3, 12), (5, 6), (2, 15)]


class Small(torch.nn.Module):
    """Hidden states from an embedding, a head, and the loss of transformers: so little that it compiles in seconds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(V, 16)
        self.lm_head = torch.nn.Linear(16, V, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.embed(input_ids).tanh())
        loss = None if labels is None else ForCausalLMLoss(logits, labels, V)
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches():
    """Another batch at each call, of the next shape."""
    for i, shape in enumerate(SHAPES):
        ids = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[:, :2] = -100
        yield ids, labels


def in_the_model(call):
    data = batches()

    def loss(model):
        ids, labels = next(data)
        return (model if call is None else call)(input_ids=ids, labels=labels).loss

    return loss


def outside(call):
    data = batches()

    def loss(model):
        ids, labels = next(data)
        logits = (model if call is None else call)(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1))

    return loss


def breaks():
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("loss", "early", "most_graphs", "most_breaks"), [(in_the_model, True, 6, 13), (outside, False, 2, 4)]
)
def test_repeated_steps_of_other_shapes(loss, early, most_graphs, most_breaks):
    """The counts are those of two compilations, since after the first the sizes are dynamic."""
    model = patch(Small()) if early else Small()
    compiled = torch.compile(model, backend="eager")
    patch(compiled)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch:")
        ours = train(model, loss(compiled), len(SHAPES))
    assert_alike(ours, train(Small(), loss(None), len(SHAPES)), rtol=1e-3, atol=1e-4)
    assert head_counts(model) == (len(SHAPES), len(SHAPES), 0)
    assert counters["stats"]["unique_graphs"] <= most_graphs
    assert breaks() <= most_breaks
    frames = counters["frames"]["total"]  # nothing is compiled for ever
    train(model, loss(compiled), len(SHAPES))
    assert counters["frames"]["total"] == frames


def test_the_body_alone_is_one_graph():
    model, stock = patch(llama()), llama()
    model.model.forward = torch.compile(model.model.forward, backend="eager", fullgraph=True, dynamic=True)
    assert_alike(train(model, in_the_model(None)), train(stock, in_the_model(None)), rtol=1e-3, atol=1e-4)
    assert head_counts(model) == (3, 3, 0)
    assert breaks() == 0


def test_a_body_trained_past_the_head_is_told():
    model = patch(llama())
    body = torch.compile(model.model, backend="eager")
    data = batches()

    def past(model):
        ids, labels = next(data)
        logits = F.linear(body(ids).last_hidden_state, model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    with pytest.warns(UserWarning, match="lm_head got a gradient without having been called"):
        train(model, past)


def test_inductor():
    model = patch(Small())
    compiled = torch.compile(model, dynamic=True)
    assert_alike(train(model, in_the_model(compiled)), train(Small(), in_the_model(None)), rtol=1e-3, atol=1e-4)
    assert head_counts(model) == (3, 3, 0)
