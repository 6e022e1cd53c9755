"""Every size, step count and learning rate of the demo, in one dataclass."""

from dataclasses import dataclass, field


def _field(default: int | float, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class DemoSettings:
    """Sizes and budgets of the demo: the cheapest that trials found to pass its gates with a margin."""

    seed: int = _field(0, "Seed of the split, the data, the initial weights and the batches.")
    held_out_share: float = _field(0.25, "Share of all scenes that no training step ever sees.")
    min_parent_accuracy: float = _field(0.95, "Held-out accuracy below which a parent is refused and the demo stops.")

    text_hidden_size: int = _field(128, "Width of the LLM.")
    text_num_layers: int = _field(3, "Layers of the LLM.")
    text_intermediate_size: int = _field(384, "Width of the LLM's MLPs, and so of its experts.")
    text_num_documents: int = _field(10000, "Conversations about scenes in words per lesson of the LLM's pretraining.")
    text_steps: int = _field(900, "Pretraining steps of the LLM.")
    text_batch_size: int = _field(64, "Conversations per pretraining step of the LLM.")
    text_learning_rate: float = _field(2e-3, "Peak learning rate of the LLM's pretraining.")

    vision_hidden_size: int = _field(128, "Width of the ViT.")
    vision_num_layers: int = _field(4, "Layers of the ViT.")
    vision_intermediate_size: int = _field(256, "Width of the ViT's MLPs, and so of its experts.")
    vision_num_images: int = _field(6000, "Pictures that the ViT is pretrained on.")
    vision_steps: int = _field(300, "Pretraining steps of the ViT.")
    vision_batch_size: int = _field(64, "Pictures per pretraining step of the ViT.")
    vision_learning_rate: float = _field(1e-3, "Peak learning rate of the ViT's pretraining.")

    text_experts: int = _field(8, "Experts per layer of the LLM, top-2.")
    vision_experts: int = _field(4, "Experts per sparse layer of the ViT, top-2.")
    connector_experts: int = _field(4, "Experts of the connector, top-2.")

    num_align: int = _field(4800, "Rows of the stage that trains the connector alone.")
    align_describe_share: float = _field(
        0.5, "Share of them that ask to describe the picture; the others are questions."
    )
    align_steps: int = _field(150, "Steps of that stage.")
    align_batch_size: int = _field(32, "Rows per step of that stage.")
    align_learning_rate: float = _field(3e-3, "Peak learning rate of that stage.")

    num_train: int = _field(8000, "Questions on pictures that the model is tuned on.")
    tune_steps: int = _field(300, "Steps of the tuning.")
    tune_batch_size: int = _field(32, "Questions per tuning step.")
    tune_learning_rate: float = _field(2e-3, "Peak learning rate of the adapters.")
    tune_connector_learning_rate: float = _field(1e-3, "Peak learning rate of the connector while adapters are tuned.")
    lora_rank: int = _field(8, "Rank of the adapters, in both towers; alpha is twice the rank.")

    num_test: int = _field(2000, "Held-out questions that a parent or a model is judged on.")
