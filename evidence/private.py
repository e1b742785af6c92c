"""What ``evidence/`` uses of W&B although W&B keeps it private, each with what it is needed for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def as_sent(workspace: "Workspace") -> str:
    """A workspace as ``save`` sends it, in JSON; no public name gives it."""
    return workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)


def refusals_of_wandb() -> tuple[type[Exception], ...]:
    """What W&B raises where it takes nothing; one of the two has no public name."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return wandb.Error, WandbApiFailedError
