"""Tells, once, that a model with a patched head is trained past it: nothing is fused then."""

import warnings

import torch


class Watch:
    """Sees a model's forwards, and the first gradient of its head's weight.

    A trainer that multiplies by the head's weight itself either calls the model, whose forward then leaves the head
    out, or the model's body alone. The second is seen by the gradient that comes to a weight whose layer was never
    called in training.
    """

    def __init__(self, model):
        self.states = _states(model)
        self.seen = self._count()
        self.warned = False

    def forward(self, model, args, output):
        """The forward hook of the model."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        if self._count() == self.seen:
            self.states = _states(model)  # somebody may have put a copy of the head into its place
            if self._count() == self.seen:
                self.warn("was not called in a training forward of its model")
        self.seen = self._count()

    def gradient(self, weight):
        """The hook behind a gradient of the head's weight."""
        if not self.warned and not self._count():
            self.warn("got a gradient without having been called in training")

    def warn(self, seen):
        if self.warned:
            return
        self.warned = True
        names = " and ".join(state.name for state in self.states) or "the patched head, which is gone,"
        warnings.warn(
            f"patch: {names} {seen}: the trainer multiplies by the head's weight itself, the head was replaced, or its"
            " class does without torch.nn.Linear.forward. Nothing is fused. Switch that off in the trainer, or call"
            " patch(model) once the trainer is built; for TRL's trainers call patch_trl() instead",
            stacklevel=3,
        )

    def _count(self):
        return sum(state.seen for state in self.states)


class _GradientHook:
    """:meth:`Watch.gradient`, in a form that :func:`stop` finds."""

    def __init__(self, watch):
        self.watch = watch

    def __call__(self, weight):
        self.watch.gradient(weight)


def start(model, layers):
    """Watch ``model``, whose patched ``layers`` give its logits."""
    stop(model)
    watch = Watch(model)
    model.register_forward_hook(watch.forward)
    for layer in layers:
        if layer.weight.requires_grad and layer.weight.is_leaf:
            layer.weight.register_post_accumulate_grad_hook(_GradientHook(watch))


def stop(model):
    """Watch ``model`` no more, nor any model inside."""
    for module in model.modules():
        _remove(module._forward_hooks, lambda hook: isinstance(getattr(hook, "__self__", None), Watch))
    for weight in model.parameters():
        _remove(weight._post_accumulate_grad_hooks, lambda hook: isinstance(hook, _GradientHook))


def _remove(hooks, of_ours):
    for key in [key for key, hook in (hooks or {}).items() if of_ours(hook)]:
        del hooks[key]


def _states(model):
    """The states of all patched layers of a model."""
    return [module._sft_kernels for module in model.modules() if "_sft_kernels" in vars(module)]
