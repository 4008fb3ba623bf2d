"""axolotl: a plug-in that patches the model and trains it with our AdamW.

``axolotl.md`` says how to use it.
"""

from axolotl.integrations.base import BasePlugin

import sft_kernels.integrations


class SFTKernelsPlugin(BasePlugin):
    def post_model_load(self, cfg, model):
        """Patch the model once its adapters are on it."""
        sft_kernels.integrations.patch(model)

    def post_trainer_create(self, cfg, trainer):
        """Choose the optimiser. Its step clips, and the Trainer does not.

        axolotl 0.19.0 calls no plug-in's ``create_optimizer``.
        """
        args = trainer.args
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm or None,
        }
        trainer.optimizer_cls_and_kwargs = (sft_kernels.AdamW, options)
        args.max_grad_norm = 0.0
