"""How a model is used, by its class: what it is, the Hub's task, and what the quick start does with its outputs."""

from dataclasses import dataclass

from .facts import CardFacts

ANSWER = """\
output = model.generate(**inputs, max_new_tokens=20)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
CLASSIFY = """\
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])"""
ENCODE = "print(model(**inputs).last_hidden_state.shape)"


@dataclass(frozen=True)
class Usage:
    """One class of model.

    Attributes:
        kind: what it is, in words.
        auto_class: what it is loaded by.
        answers: whether a chat is laid out for an answer of the model.
        use: the code behind the inputs.
        task: the Hub's pipeline; None where none of them takes an image and a text to what the model gives.
    """

    kind: str
    auto_class: str
    answers: bool
    use: str
    task: str | None = None


GENERATES = Usage("vision-language model", "AutoModelForImageTextToText", True, ANSWER, "image-text-to-text")
CLASSIFIES = Usage("classifier of images and text", "AutoModelForSequenceClassification", False, CLASSIFY)
USAGES = {
    "VLMoEForConditionalGeneration": GENERATES,
    "VLMoEForSequenceClassification": CLASSIFIES,
    "VLMoEModel": Usage("vision-language model without a head", "AutoModel", False, ENCODE),
}
# PEFT's names of what an adapter was tuned for.
ADAPTER_USAGES = {"SEQ_CLS": CLASSIFIES}


def find_usage(facts: CardFacts) -> Usage:
    """How a folder's model, or the model of its adapter, is used."""
    if facts.adapter is not None:
        return ADAPTER_USAGES.get(str(facts.adapter.get("task_type")), GENERATES)
    architectures = getattr(facts.config, "architectures", None) or []
    return next((USAGES[name] for name in architectures if name in USAGES), GENERATES)
