"""For `evaluate.load`: the metric of the task anls."""

from modeling_vlmoe.finetune.evaluate.offline_metrics import ANLS

__all__ = ["ANLS"]
