"""For `evaluate.load`: the metric of the task caption."""

from modeling_vlmoe.finetune.evaluate.offline_metrics import CaptionScores

__all__ = ["CaptionScores"]
