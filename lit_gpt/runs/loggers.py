"""Where metrics go besides metrics.csv, which every run writes: TensorBoard, or Weights & Biases."""

from collections.abc import Sequence
from typing import Any, Literal

from lit_gpt.packages import import_fabric, is_installed, require

LoggerName = Literal["tensorboard", "wandb"]


def make_loggers(logger: LoggerName | None, log_dir: str) -> Sequence[Any]:
    """Fabric's loggers for a run: the one that --logger names, or none.

    Raises:
        InputError: its package is not installed.
    """
    if logger is None:
        return []
    if logger == "wandb":
        require("wandb", "loggers", "--logger wandb")
        return [wandb_logger(log_dir)]

    # Fabric's logger also takes tensorboardX
    if not is_installed("tensorboardX"):
        require("tensorboard", "loggers", "--logger tensorboard")
    return [tensorboard_logger(log_dir)]


def tensorboard_logger(log_dir: str) -> Any:
    """Fabric's own logger. It writes to `log_dir`/tensorboard."""
    import_fabric()
    from lightning_fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(log_dir, name="tensorboard")


def wandb_logger(log_dir: str) -> Any:
    """A logger that writes to `log_dir`/wandb and sends it, once there is something to log.

    The one of Lightning 2.6 is in the package pytorch_lightning, whose import takes seconds: it has a second trainer.
    """
    import wandb

    import_fabric()
    from lightning_fabric.loggers.logger import Logger
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    class WandbLogger(Logger):
        name = "wandb"
        version = None

        @rank_zero_only
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            # not before: `launch` makes a logger in every process, and only the first one logs
            if wandb.run is None:
                wandb.init(dir=log_dir)
            wandb.log(metrics, step=step)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Does nothing: they are in hyperparameters.yaml."""

    return WandbLogger()
