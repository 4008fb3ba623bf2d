"""The thin reference trainer: masked, packed, one denominator a step."""

from contextlib import nullcontext
from functools import partial

from ..integrations.neftune import neftune
from . import model as models
from . import resume
from .checkpoints import Checkpoints, only_run
from .dataset import end_of_turn
from .finish import saved_at_the_end
from .guards import Watch, check_learning_rate
from .held_out import HeldOut
from .precision import decay_of
from .prepare import prepare
from .progress import say
from .report import RunLog
from .run import Run
from .saving import rehearse


def train(recipe, *, model=None, tokenizer=None):
    """Run ``recipe``; returns ``(model, tokenizer, log)``, the log being :class:`~.report.RunLog`.

    Everything that can be wrong with the data or the model is found before the first file is written, and so is all
    that would keep the model from being saved. A model and tokenizer that are handed in are used in place of the
    recipe's; the model is then tuned as it is.

    From the first step on SIGINT and SIGTERM finish the step, save a checkpoint and raise :class:`~.finish.Stopped`, a
    ``KeyboardInterrupt``. A model that cannot be saved in ``out`` is saved elsewhere, and :class:`~.saving.NotSaved`,
    an ``OSError``, says where. Both carry what would have been returned as ``result``.

    With ``recipe.resume`` the run in ``out`` goes on, to the bit as if nothing had ended it.

    Raises:
        ValueError: a value of the recipe, or a model or data that cannot be trained on.
        OSError: a file that cannot be read, or a folder that cannot be written to or that another run is in.
        TooManySkips: ``recipe.max_skips`` steps in a row were skipped; a checkpoint is there.
    """
    ready = prepare(recipe, model, tokenizer)
    recipe, out, earlier = ready.recipe, ready.out, ready.earlier
    model, tokenizer = ready.model, ready.tokenizer
    run, judge = Run(ready), HeldOut(ready)
    if not earlier:
        check_learning_rate(recipe.lr, model)
        say(decay_of(run.parts.optimizer))
    end = end_of_turn(ready.examples) if recipe.mask == "completion+eot" else None
    rehearse(model, tokenizer, out, end, **run.room())
    resumed = earlier is not None and earlier.model is not None
    with only_run(out):
        if earlier:
            resume.check_still(out, earlier)
        done = run.go_on() if resumed else 0
        watch = Watch(recipe.max_skips)
        log = RunLog(
            out,
            run.steps.total,
            recipe.log_every,
            watch,
            earlier and earlier.log_bytes,
            done,
            clip=recipe.max_grad_norm,
            tensorboard=recipe.tensorboard,
        )
        run.log, run.checkpoints = log, Checkpoints(out, recipe.keep)
        run.checkpoints.rotate(done)  # a kill may have come before
        log.best = earlier.progress["best"] if resumed else None
        watch.go_on(log.history)
        measure = partial(judge.measure, log=log)
        with saved_at_the_end(model, tokenizer, log, measure, run.checkpoint, replace=bool(earlier)) as stop:
            model.train()
            with (
                models.boundaries_given(model),
                neftune(model, recipe.neftune_alpha) if recipe.neftune_alpha else nullcontext(),
            ):
                measured = log.history[-1:] and "eval" in log.history[-1]
                if not done or (_due(recipe.eval_every, done) and not measured):
                    measure(stop, done)
                for step, micro_batches in stop.steps(run.steps.after(done)):
                    run.step(step, micro_batches)
                    watch.check()
                    if step < run.steps.total:
                        if _due(recipe.eval_every, step):
                            measure(stop, step)
                        if _due(recipe.save_every, step):
                            run.save()
                log.flush()
                watch.check()
    return model, tokenizer, log


def _due(every, step):
    return every and step % every == 0
