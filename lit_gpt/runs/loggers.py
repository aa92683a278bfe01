"""TODO doc of runs.loggers"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lit_gpt.errors import InputError

if TYPE_CHECKING:
    pass

LoggerName = Literal["tensorboard", "wandb"]


def make_loggers(logger: LoggerName | None, log_dir: str) -> Sequence[Any]:
    """metrics.csv is always written; these come on top."""
    if logger is None:
        return []
    try:
        if logger == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            return [TensorBoardLogger(log_dir, name="tensorboard")]
        return [wandb_logger(log_dir)]
    except ModuleNotFoundError:
        raise InputError(f"--logger {logger} needs a package that is not installed: pip install {logger}") from None


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
