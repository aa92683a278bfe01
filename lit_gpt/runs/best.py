"""Which validation is the best one: the rule for `best`, for patience, and for what the report says."""


def is_better(loss: float, metric: float | None, best_loss: float, best_metric: float | None) -> bool:
    """Whether a validation is better than the best before it.

    Without a metric, which is None then, the loss decides; else the metric, and the loss between equals.
    """
    if metric is None or best_metric is None:
        return loss < best_loss
    return (metric, -loss) > (best_metric, -best_loss)


def is_within(forgetting: float | None, budget: float | None) -> bool:
    """Whether a model has forgotten no more than it may: its KL to the base against --train.max_forgetting."""
    return budget is None or forgetting is None or forgetting <= budget
