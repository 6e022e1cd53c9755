"""For `evaluate.load`: the metric of the task multiple-choice."""

from modeling_vlmoe.finetune.evaluate.offline_metrics import MultipleChoice

__all__ = ["MultipleChoice"]
