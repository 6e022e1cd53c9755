"""Makes the demo's two parents: a small Qwen3 that reads scenes in words, and a small SigLIP that sees them.

They stand in for what a user downloads: each is pretrained alone, on training scenes only, and saved as such models
are. Neither is saved below `min_parent_accuracy` on held-out scenes: an LLM that cannot bind an object to its colour
and place in words does not learn it from pictures in minutes.

    >>> pretrain_text(Path("parents/text"), DemoSettings(seed=0))
    0.99
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    get_cosine_schedule_with_warmup,
)

from .scenes import (
    CELL_LABELS,
    CELL_OF_PATCH,
    DESCRIBE,
    IMAGE_SIZE,
    KINDS,
    PATCH_SIZE,
    PLACES,
    QuestionBank,
    Sample,
    Scene,
    cell_labels,
    cell_words,
    describe,
    patch_labels,
    questions_about,
    render,
    split_scenes,
)
from .settings import DemoSettings

logger = logging.getLogger(__name__)

Chat = list[dict[str, str]]
Row = tuple[list[int], list[int]]  # input_ids, labels
IGNORED = -100  # label of a token that no loss looks at
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- set text = message.content if message.content is string else message.content
    | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- if message.role == 'assistant' -%}
{% generation %}{{ text + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ text + '<|im_end|>' }}
{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


@dataclass(frozen=True)
class Lesson:
    """One part of the LLM's curriculum: without it, hundreds of steps pass before the first question is understood.

    Attributes:
        share: Share of the steps.
        kinds: Kinds of question asked.
        one_item_share: Share of scenes with one item, where words are learnt before binding is.
        describe_share: Share of requests to describe the scene.
    """

    share: float
    kinds: tuple[str, ...]
    one_item_share: float
    describe_share: float = 0.0


LESSONS = (
    Lesson(0.10, ("colour", "shape", "place"), one_item_share=0.7),
    Lesson(0.25, ("colour", "shape", "place"), one_item_share=0.1),
    Lesson(0.65, KINDS, one_item_share=0.0, describe_share=0.05),
)


def scene_in_words(scene: Scene, rng: np.random.Generator) -> str:
    """Says a scene in one word per cell or per patch, half the time shuffled, so that a reader goes by the words."""
    cells: Sequence[int] = range(len(PLACES)) if rng.random() < 0.7 else CELL_OF_PATCH
    return cell_words(scene, cells if rng.random() < 0.5 else rng.permutation(cells).tolist())


def conversation(text: str, question: str, answer: str) -> Chat:
    """Builds the chat messages of one question, which follows the text on a new line, and its answer."""
    return [{"role": "user", "content": f"{text}\n{question}"}, {"role": "assistant", "content": answer}]


def write_lesson(scenes: list[Scene], lesson: Lesson, num_documents: int, rng: np.random.Generator) -> list[Chat]:
    """Writes conversations about scenes in words."""
    bank = QuestionBank(scenes)
    one_item = [scene for scene in scenes if len(scene.items) == 1]
    documents: list[Chat] = []
    for _ in range(num_documents):
        kind = lesson.kinds[rng.integers(len(lesson.kinds))]
        sample = bank.sample(kind, rng)
        scene, question, answer = sample.scene, sample.question, sample.answer
        if rng.random() < lesson.one_item_share:
            scene = one_item[rng.integers(len(one_item))]
            questions = [question for question in questions_about(scene) if question.kind == kind]
            picked = questions[rng.integers(len(questions))]
            question, answer = picked.text, picked.answer
        if rng.random() < lesson.describe_share:
            question, answer = DESCRIBE, describe(scene)
        documents.append(conversation(scene_in_words(scene, rng), question, answer))
    return documents


def train_tokenizer(documents: list[Chat]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, with ChatML turns as its chat template, on the words of conversations."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[\w-]+|\s|[^\w\s]")  # a tile is one word, as a patch is one token
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}" for document in documents for message in document)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=END_OF_TEXT, eos_token=TURN_END, chat_template=CHAT_TEMPLATE
    )


def encode_chats(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> list[Row]:
    """Tokenizes conversations into (input_ids, labels); only the assistant's words are labels."""
    encoded: Any = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    return [
        (ids, [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)])
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    ]


def pad_batch(rows: list[Row], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pads (input_ids, labels) on the right. No mask is needed: the padding comes after all that is judged."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    return input_ids, labels


def fit(module: nn.Module, loss_of_step: Callable[[int], Tensor], num_steps: int, learning_rate: float) -> None:
    """Trains a module with AdamW, a short warmup and a cosine to zero.

    Args:
        module: What is trained, in place.
        loss_of_step: Returns the loss of the step with this number.
        num_steps: Number of optimizer steps.
        learning_rate: Peak learning rate.
    """
    module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(num_steps // 20, 1), num_steps)
    for step in range(num_steps):
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % 100 == 0:
            logger.info("step %d of %d, loss %.4f", step + 1, num_steps, loss.item())
    module.eval()


def _batch_indices(num_rows: int, batch_size: int, num_steps: int, seed: int) -> list[list[int]]:
    """Deals rows into batches, epoch after epoch, each in its own order."""
    rng = np.random.default_rng(seed)
    num_epochs = -(-num_steps * batch_size // num_rows)
    order = np.concatenate([rng.permutation(num_rows) for _ in range(num_epochs)])
    return [order[step * batch_size : (step + 1) * batch_size].tolist() for step in range(num_steps)]


def _batches_of_like_length(rows: list[Row], batch_size: int, num_steps: int, seed: int) -> list[list[Row]]:
    """Deals rows into batches, four at a time sorted by length: a quarter fewer tokens."""
    batches: list[list[Row]] = []
    for indices in _batch_indices(len(rows), 4 * batch_size, -(-num_steps // 4), seed):
        in_order = sorted((rows[i] for i in indices), key=lambda row: len(row[0]))
        four = [in_order[start : start + batch_size] for start in range(0, len(in_order), batch_size)]
        batches += [four[i] for i in np.random.default_rng((seed, len(batches))).permutation(len(four))]
    return batches[:num_steps]


def require_accuracy(parent: str, accuracy: float, minimum: float, remedy: str) -> None:
    """Raises if a parent is not good enough to build on.

    Args:
        parent: What the accuracy is of, for the message.
        accuracy: Its share of right answers on held-out scenes.
        minimum: The least share accepted.
        remedy: The setting to raise, for the message.
    """
    if accuracy < minimum:
        raise ValueError(
            f"The demo's {parent} reaches {accuracy:.3f} on held-out scenes, expected at least {minimum:.3f}: a "
            f"model made from it would not learn from pictures what it lacks. Raise {remedy}, or try another seed."
        )


@torch.no_grad()
def text_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: list[Sample], rng: np.random.Generator
) -> float:
    """Returns the share of questions on scenes in words whose whole answer is the model's greedy one."""
    chats = [conversation(scene_in_words(s.scene, rng), s.question, s.answer) for s in samples]
    rows = encode_chats(tokenizer, chats)
    num_right = 0
    for start in range(0, len(rows), 250):
        input_ids, labels = pad_batch(rows[start : start + 250], tokenizer.pad_token_id)
        predicted = model(input_ids=input_ids, use_cache=False).logits[:, :-1].argmax(-1)
        is_right = (predicted == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
        num_right += is_right.all(-1).sum().item()
    return num_right / len(samples)


def pretrain_text(output_dir: Path, settings: DemoSettings) -> float:
    """Pretrains the LLM and its tokenizer, checks them, and saves both.

    Args:
        output_dir: Folder for the model and the tokenizer.
        settings: Sizes and budget.

    Returns:
        Accuracy on held-out scenes in words.

    Raises:
        ValueError: If it is below `settings.min_parent_accuracy`; nothing is saved then.
    """
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    train_scenes, held_out_scenes = split_scenes(settings.seed, settings.held_out_share)
    lessons = [write_lesson(train_scenes, lesson, settings.text_num_documents, rng) for lesson in LESSONS]
    tokenizer = train_tokenizer([document for documents in lessons for document in documents])
    batches: list[list[Row]] = []
    for lesson, documents in zip(LESSONS, lessons, strict=True):
        rows = encode_chats(tokenizer, documents)
        num_steps = max(1, round(lesson.share * settings.text_steps))
        batches += _batches_of_like_length(rows, settings.text_batch_size, num_steps, settings.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_hidden_size,
        intermediate_size=settings.text_intermediate_size,
        num_hidden_layers=settings.text_num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.text_hidden_size // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=settings.text_hidden_size**-0.5,  # 0.02 is for widths of thousands: here it learns slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)

    def loss_of_step(step: int) -> Tensor:
        input_ids, labels = pad_batch(batches[step], tokenizer.pad_token_id)
        return model(input_ids=input_ids, labels=labels, use_cache=False).loss

    fit(model, loss_of_step, len(batches), settings.text_learning_rate)
    samples = QuestionBank(held_out_scenes).balanced(settings.num_test, rng)
    accuracy = text_accuracy(model, tokenizer, samples, rng)
    require_accuracy("LLM", accuracy, settings.min_parent_accuracy, "text_steps")
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return accuracy


class _PatchHead(nn.Module):
    """The ViT and the linear head it is pretrained with, which names each patch's cell and what is in it."""

    def __init__(self, vision: SiglipVisionModel):
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(vision.config.hidden_size, len(CELL_LABELS) + len(PLACES))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.vision(pixel_values=pixel_values).last_hidden_state
        content, place = self.head(hidden).split([len(CELL_LABELS), len(PLACES)], dim=-1)
        return content, place


@torch.no_grad()
def cell_accuracy(model: nn.Module, pixel_values: Tensor, labels: Tensor) -> float:
    """Returns the share of cells whose content is named rightly by the mean over the cell's patches.

    Args:
        model: Maps pixels to content logits `(batch, patches, labels)` and place logits.
        pixel_values: `(batch, 3, height, width)`.
        labels: `(batch, cells)`, indices into `CELL_LABELS`.
    """
    content = torch.cat([model(pixels)[0] for pixels in pixel_values.split(250)])
    cell_of_patch = F.one_hot(torch.tensor(CELL_OF_PATCH)).to(content.dtype)
    predicted = torch.einsum("bpl,pc->bcl", content, cell_of_patch).argmax(-1)
    return (predicted == labels).float().mean().item()


def _render_all(scenes: list[Scene], processor: SiglipImageProcessorPil, rng: np.random.Generator) -> Tensor:
    return processor([render(scene, rng) for scene in scenes], return_tensors="pt")["pixel_values"]


def _pick_scenes(scenes: list[Scene], num_picked: int, rng: np.random.Generator) -> list[Scene]:
    """Picks scenes, each number of items equally often: one-item scenes are few."""
    by_number = [[scene for scene in scenes if len(scene.items) == number] for number in (1, 2)]
    return [pool[rng.integers(len(pool))] for pool in (by_number[i % 2] for i in range(num_picked))]


def pretrain_vision(output_dir: Path, settings: DemoSettings) -> float:
    """Pretrains the ViT with a throwaway head, checks it, and saves it with its image processor.

    Args:
        output_dir: Folder for the model and the image processor.
        settings: Sizes and budget.

    Returns:
        Accuracy per cell on held-out scenes.

    Raises:
        ValueError: If it is below `settings.min_parent_accuracy`; nothing is saved then.
    """
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    train_scenes, held_out_scenes = split_scenes(settings.seed, settings.held_out_share)
    processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    scenes = _pick_scenes(train_scenes, settings.vision_num_images, rng)
    pixel_values = _render_all(scenes, processor, rng)
    contents = torch.tensor([patch_labels(scene) for scene in scenes])
    places = torch.tensor(CELL_OF_PATCH)
    config = SiglipVisionConfig(
        hidden_size=settings.vision_hidden_size,
        intermediate_size=settings.vision_intermediate_size,
        num_hidden_layers=settings.vision_num_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    model = _PatchHead(SiglipVisionModel(config))
    batches = _batch_indices(len(scenes), settings.vision_batch_size, settings.vision_steps, settings.seed)

    def loss_of_step(step: int) -> Tensor:
        content, place = model(pixel_values[batches[step]])
        place_loss = F.cross_entropy(place.flatten(0, 1), places.repeat(len(place)))
        return F.cross_entropy(content.flatten(0, 1), contents[batches[step]].flatten()) + 0.5 * place_loss

    fit(model, loss_of_step, settings.vision_steps, settings.vision_learning_rate)
    test_scenes = _pick_scenes(held_out_scenes, settings.num_test, rng)
    labels = torch.tensor([cell_labels(scene) for scene in test_scenes])
    accuracy = cell_accuracy(model, _render_all(test_scenes, processor, rng), labels)
    require_accuracy("ViT", accuracy, settings.min_parent_accuracy, "vision_steps")
    model.vision.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return accuracy
