"""VLMs whose LLM is asked in unusual ways: behind an encoder, past the model around it, or with frames alone."""

import json

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, is_torchvision_available

from modeling_vlmoe.conversion.arguments import UpcycleArguments
from modeling_vlmoe.conversion.backbones.tiny_configs import IMAGE_SIZE, VOCABULARY
from modeling_vlmoe.conversion.backbones.tiny_vlms import IMAGE_TOKEN, build_vlm
from modeling_vlmoe.conversion.gaps import LIMIT, measure_gap
from modeling_vlmoe.conversion.host_processors import load_processor, process
from modeling_vlmoe.conversion.host_proof import accepted
from modeling_vlmoe.conversion.upcycle import upcycle
from modeling_vlmoe.finetune.checkpoints import check_decoder
from modeling_vlmoe.finetune.checkpoints import load_processor as tuning_processor
from modeling_vlmoe.parts import find_towers

SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
PICTURE, MARKS = "<image>", {"boi_token": "<begin>", "eoi_token": "<end>"}


def tokenizer(place=PICTURE, **tokens):
    """Words, of which `place` stands for an image."""
    words = ["<pad>", "<s>", "</s>", "<unk>", place, *(set(tokens.values()) - {place})]
    assert words[IMAGE_TOKEN] == place
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, extra_special_tokens=tokens, **special)


def blip2(config):
    return transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size=SQUARE), tokenizer(), num_query_tokens=config.num_query_tokens
    )


def florence2(config):
    images = transformers.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, image_seq_length=5)
    return transformers.Florence2Processor(images, tokenizer(image_token=PICTURE))


def instructblipvideo(config):
    frames = transformers.InstructBlipVideoVideoProcessor(size=SQUARE)
    words = [tokenizer("<video>"), tokenizer("<video>")]
    return transformers.InstructBlipVideoProcessor(frames, *words, num_query_tokens=config.num_query_tokens)


def pp_formulanet(config):
    return transformers.PPFormulaNetProcessor(transformers.PPFormulaNetImageProcessor(size=SQUARE), tokenizer())


def t5gemma2(config):
    images = transformers.Gemma3ImageProcessorPil(size=SQUARE)
    return transformers.Gemma3Processor(images, tokenizer(image_token=PICTURE, **MARKS), image_seq_length=4)


def trocr(config):
    return transformers.TrOCRProcessor(transformers.ViTImageProcessorPil(size=SQUARE), tokenizer())


# By family: its processor, and where its LLM is.
FAMILIES = {
    "blip-2": (blip2, "language_model.model.decoder"),
    "florence2": (florence2, "model.language_model.decoder"),
    "instructblipvideo": (instructblipvideo, "language_model.model.decoder"),
    "pp_formulanet": (pp_formulanet, "model.decoder"),
    "t5gemma2": (t5gemma2, "model.decoder"),
    "vision-encoder-decoder": (trocr, "decoder.bert"),
}
WITH_TORCHVISION = ("instructblipvideo", "pp_formulanet")
READ_HERE = [family for family in FAMILIES if family not in WITH_TORCHVISION or is_torchvision_available()]


@pytest.fixture(scope="module", params=READ_HERE)
def upcycled(request, tmp_path_factory):
    """The family, the dense VLM, the sparse one, and what a picture becomes."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    dense = build_vlm(family)
    dense.save_pretrained(folder / "dense")
    FAMILIES[family][0](dense.config).save_pretrained(folder / "dense")
    out = upcycle(UpcycleArguments(vlm_model=str(folder / "dense"), text_experts=4, output_dir=str(folder / "out")))
    sparse = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    pictures = [Image.effect_noise((40, 48), 100).convert("RGB")] * (4 if family == "instructblipvideo" else 1)
    return family, dense, sparse, accepted(dense, process(load_processor(out, "it", None)[0], pictures, "it"))


@torch.no_grad()
def test_an_upcycled_vlm_gives_the_dense_logits_and_tokens(upcycled):
    _, dense, sparse, inputs = upcycled
    options = {"max_new_tokens": 6, "do_sample": False}
    answer = dense.generate(**inputs, **options)
    assert torch.equal(sparse.generate(**inputs, **options), answer)
    given = inputs | ({"decoder_input_ids": answer} if dense.config.is_encoder_decoder else {})
    assert measure_gap(dense(**given).logits, sparse(**given).logits) <= LIMIT


def test_raises_when_one_with_an_encoder_is_to_be_tuned_on_conversations(upcycled):
    _, dense, sparse, _ = upcycled
    if not dense.config.is_encoder_decoder:
        check_decoder("model", sparse.config)
        return
    with pytest.raises(ValueError, match="so the encoder would read the answers"):
        tuning_processor("model", sparse.config)


def test_router_losses_of_the_llm_are_not_lost(upcycled):
    family, dense, sparse, inputs = upcycled
    path, _ = find_towers(sparse)["text"]
    assert path == FAMILIES[family][1]
    words = torch.full((1, 6), IMAGE_TOKEN + 1)
    given = inputs | ({"decoder_input_ids": words} if dense.config.is_encoder_decoder else {})
    outputs = sparse.train()(**given, output_router_logits=True)
    sparse.eval()
    assert len(outputs.router_logits) == len(sparse.config.text_moe.layers)
    assert outputs.router_losses["text"] is not None


def test_a_processor_that_needs_torchvision_is_read_or_refused_in_words(tmp_path):
    dense = tmp_path / "dense"
    build_vlm("pp_formulanet").save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    images = {"image_processor_type": "PPFormulaNetImageProcessor", "size": SQUARE}
    values = {"processor_class": "PPFormulaNetProcessor", "image_processor": images}
    (dense / "processor_config.json").write_text(json.dumps(values))
    args = UpcycleArguments(vlm_model=str(dense), text_experts=4, output_dir=str(tmp_path / "out"))
    if is_torchvision_available():
        assert upcycle(args).is_dir()
        return
    with pytest.raises(ValueError, match=r"has no processor that can be loaded\. Add or mend it: .*[Tt]orchvision"):
        upcycle(args)
    assert not (tmp_path / "out").exists()
