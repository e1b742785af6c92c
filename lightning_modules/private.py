"""Lightning's private API that this room uses, all of it: an upgrade of Lightning is work on this file alone."""

import lightning as L


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """The trainer that ``module`` is attached to, or None; ``module.trainer`` raises where there is none."""
    return module._trainer
