"""TODO doc of runs.loggers"""

from collections.abc import Sequence
from typing import Any, Literal

from lit_gpt.packages import is_installed, require

LoggerName = Literal["tensorboard", "wandb"]


def make_loggers(logger: LoggerName | None, log_dir: str) -> Sequence[Any]:
    """metrics.csv is always written; these come on top."""
    if logger is None:
        return []
    if logger == "wandb":
        require("wandb", "loggers", "--logger wandb")
        return [wandb_logger(log_dir)]

    if not is_installed("tensorboardX"):  # which Fabric's logger takes as well
        require("tensorboard", "loggers", "--logger tensorboard")
    from lightning_fabric.loggers import TensorBoardLogger

    return [TensorBoardLogger(log_dir, name="tensorboard")]


def wandb_logger(log_dir: str) -> Any:
    """Fabric has one only in a package that imports a second trainer."""
    import wandb
    from lightning_fabric.loggers.logger import Logger
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    class WandbLogger(Logger):
        name, version = "wandb", None

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if wandb.run is None:
                wandb.init(dir=log_dir)
            wandb.log(metrics, step=step)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """They are in hyperparameters.yaml."""

    return WandbLogger()
