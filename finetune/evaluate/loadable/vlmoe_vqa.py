"""For `evaluate.load`: the metric of the task vqa."""

from modeling_vlmoe.finetune.evaluate.offline_metrics import VQAAccuracy

__all__ = ["VQAAccuracy"]
