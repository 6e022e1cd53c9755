"""For `evaluate.load`: the metric of the task yes-no."""

from modeling_vlmoe.finetune.evaluate.offline_metrics import YesNoScores

__all__ = ["YesNoScores"]
