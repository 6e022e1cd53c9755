"""`vlmoe densify` and `vlmoe compress` of a host's VLM that is sparse in place, on what its own processor makes."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, is_torchvision_available

from modeling_vlmoe.cli import app
from modeling_vlmoe.conversion import (
    CompressArguments,
    DensifyArguments,
    ExportArguments,
    ProofError,
    UpcycleArguments,
    compress,
    densify,
    export,
    host_inputs,
    operations,
    rewrite_plan,
    upcycle,
)
from modeling_vlmoe.conversion.export import open_checkpoint
from modeling_vlmoe.conversion.host_processors import VIDEO, load_processor, processor_files
from modeling_vlmoe.conversion.rewrite_plan import plan_rewrite
from modeling_vlmoe.conversion.rewriting import REWRITE_RECEIPT_NAME, preview_rewrite
from modeling_vlmoe.delta_experts import delta_experts
from modeling_vlmoe.finetune import lora_config
from modeling_vlmoe.finetune.checkpoints import merge_adapter
from modeling_vlmoe.parts import blocks_of
from modeling_vlmoe.towers import sparse_blocks
from tests import hosts
from tests.conversion.sparse_checkpoints import save_hosted
from tests.modeling_vlmoe.expert_oracles import stacks_of
from tests.models import EXPERTS, gap

LIMIT = 1e-5
FAMILIES = ("qwen2_5_vl", "smolvlm", "llava_next")
DELTA = EXPERTS | {"expert_type": "delta", "expert_rank": 3}
OTHERS = {"num_experts": 3, "num_experts_per_tok": 1}  # parts are counted apart


def save(folder, family, kind, dtype=torch.float32):
    """A host's VLM with unlike experts in every part that can have them."""
    parts = {"vision_moe": kind | OTHERS}
    if hosts.HOSTS[family].has_connector:
        parts["connector_moe"] = kind
    return save_hosted(folder, family, moe=kind, dtype=dtype, **parts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a family's folder with experts of a kind, written once, to be read only."""
    root, made = tmp_path_factory.mktemp("hosts"), {}

    def get(family, kind):
        if (family, kind) not in made:
            fields = {"delta": DELTA, "full": EXPERTS}[kind]
            made[family, kind] = save(root / family / kind, family, fields)
        return made[family, kind]

    return get


@pytest.fixture(scope="module")
def densified(saved, tmp_path_factory):
    """Gives a family's delta model and the same with whole experts, written once, to be read only."""
    root, made = tmp_path_factory.mktemp("densified"), {}

    def get(family):
        if family not in made:
            made[family] = densify(DensifyArguments(saved(family, "delta"), root / family))
        return saved(family, "delta"), made[family]

    return get


def load(folder, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(folder, family):
    """What a folder's model makes of two pictures and text, as its own processor gives them."""
    processor, _ = load_processor(folder, "it", None)
    return load(folder)(**hosts.inputs(processor, family, (2,))).logits


def receipt(folder):
    return json.loads((folder / REWRITE_RECEIPT_NAME).read_text())


# Densify


@pytest.mark.parametrize("family", FAMILIES)
def test_densified_experts_compute_the_same(densified, family):
    delta, out = densified(family)
    model, host = load(out), hosts.HOSTS[family]
    assert not delta_experts(model)
    assert isinstance(model, type(load(delta)))
    assert len(sparse_blocks(model)) == 3 + (host.layers - max(1, host.layers // 2)) + host.has_connector
    assert (model.config.text_moe.expert_type, model.config.vision_moe.expert_rank) == ("full", None)
    assert gap(logits(out, family), logits(delta, family)) <= LIMIT
    for path, experts in delta_experts(load(delta)):
        whole = model.get_submodule(path)
        stacks = stacks_of(experts)
        assert all(torch.allclose(getattr(whole, name), stacks[name], atol=1e-6) for name in whole.stacks)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_and_the_logits_are_proved(densified, family):
    _, out = densified(family)
    written = receipt(out)
    proved = written["proof"]["gaps"]
    for path, _ in sparse_blocks(load(out)):
        assert {f"{path} on random input", f"{path} by every expert"} <= set(proved)
    assert "logits of a picture and text" in proved
    assert written["proof"]["largest_gap"] <= written["proof"]["largest_gap_limit"]
    assert written["proof"]["informative"]["logits of a picture and text, from those by unrounded weights"] <= LIMIT
    assert str(out.parent) not in json.dumps(written)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_proved_or_said_not_to_be(densified, family):
    """A video processor needs torchvision."""
    written = receipt(densified(family)[1])
    has_videos = VIDEO in hosts.processor_class(hosts.HOSTS[family]).get_attributes()
    is_run = "logits of a video and text" in written["proof"]["gaps"]
    assert is_run == (has_videos and is_torchvision_available())
    assert (written["not_proved"] is None) == (is_run or not has_videos)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_beside_the_weights_is_the_sources(densified, family):
    delta, out = densified(family)
    names = [file.relative_to(delta) for file in processor_files(delta)]
    assert names
    assert all((out / name).read_bytes() == (delta / name).read_bytes() for name in names)
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 12
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (delta, out))
    for part in ("text_moe", "vision_moe", "connector_moe"):
        assert (before.pop(part) is None) == (after.pop(part) is None)
    assert before == after
    assert (out / "modeling_in_place.py").is_file()
    assert "3 experts in layers" in (out / "README.md").read_text()


def test_a_processor_that_no_file_names_is_named(tmp_path):
    delta = save_hosted(tmp_path / "delta", "llava_next", moe=DELTA)
    for file in (delta / "processor_config.json", delta / "tokenizer_config.json"):
        values = json.loads(file.read_text())
        values.pop("processor_class", None)
        file.write_text(json.dumps(values))
    out = densify(DensifyArguments(delta, tmp_path / "out"))
    assert type(AutoProcessor.from_pretrained(out)).__name__ == "LlavaNextProcessor"


def test_it_loads_by_the_auto_classes_without_the_package(densified, run_without_package):
    """Of the other hosts AutoProcessor's needs torchvision, dense or sparse."""
    delta, out = densified("llava_next")
    assert type(AutoProcessor.from_pretrained(out)) is type(AutoProcessor.from_pretrained(delta))
    printed = run_without_package(f"""
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, code = {str(out)!r}, {{"trust_remote_code": True}}
model, processor = (auto.from_pretrained(folder, **code) for auto in (AutoModelForImageTextToText, AutoProcessor))
print(type(model).__name__, model.config.text_moe.expert_type, type(processor).__name__)
""")
    assert printed.split() == ["SparseLlavaNextForConditionalGeneration", "full", "LlavaNextProcessor"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_half_precision_is_rounded_once_or_not_at_all(dtype, tmp_path):
    source = save(tmp_path / "delta", "qwen2_5_vl", DELTA, torch.bfloat16)
    out = densify(DensifyArguments(source, tmp_path / "out", dtype=dtype))
    model, wanted = load(out, "auto"), torch.float32 if dtype else torch.bfloat16
    for _, block in sparse_blocks(model):
        assert block.experts.down_proj.dtype == wanted
        assert block.router.weight.dtype == torch.float32
    assert {model.config.dtype, model.config.text_config.dtype, model.config.vision_config.dtype} == {wanted}
    unrounded = receipt(out)["proof"]["informative"]["logits of a picture and text, from those by unrounded weights"]
    assert unrounded <= LIMIT if dtype else 1e-4 < unrounded < 0.5


@pytest.mark.parametrize(("family", "wanted"), [("qwen3_vl", "qwen3_vl_moe"), ("smolvlm", "smolvlm")])
def test_densified_models_are_exported(family, wanted, tmp_path):
    delta = save_hosted(tmp_path / "delta", family, moe=DELTA)
    for to in ("native", "text"):
        with pytest.raises(ValueError, match=r"vlmoe export needs experts with weights of their own.*vlmoe densify"):
            export(ExportArguments(str(delta), output_dir=str(tmp_path / "native"), to=to))
    out = densify(DensifyArguments(delta, tmp_path / "out"))
    native = export(ExportArguments(str(out), output_dir=str(tmp_path / "native")))
    assert json.loads((native / "config.json").read_text())["model_type"] == wanted
    model = load(native)
    assert type(model).__module__.startswith("transformers.")
    given = hosts.inputs(load_processor(native, "it", wanted)[0], family, (2,))
    with torch.no_grad():
        assert gap(model(**given).logits, logits(delta, family)) <= LIMIT
    assert REWRITE_RECEIPT_NAME not in {file.name for file in native.iterdir()}


def test_the_lm_alone_is_exported_beside_delta_experts_in_the_vit(tmp_path):
    delta = save_hosted(tmp_path / "delta", "smolvlm", vision_moe=DELTA)
    with pytest.raises(ValueError, match=r"those of vision are delta experts.*vlmoe densify"):
        export(ExportArguments(str(delta), output_dir=str(tmp_path / "native")))
    assert export(ExportArguments(str(delta), output_dir=str(tmp_path / "text"), to="text")).is_dir()


# What is no checkpoint


def test_a_wrong_sum_is_no_checkpoint(saved, tmp_path, monkeypatch, leaves_nothing):
    right = operations.OPERATIONS["sum"]

    def wrong(assignment, drawing):
        blocks = list(right(assignment, drawing))
        yield from reversed(blocks) if ".visual.merger." in assignment.spec.name else blocks

    monkeypatch.setitem(operations.OPERATIONS, "sum", wrong)
    said = (
        r"The model with whole experts is not the model with delta experts: model\.visual\.merger\.mlp .* differs by"
    )
    with leaves_nothing(), pytest.raises(ProofError, match=said):
        densify(DensifyArguments(saved("qwen2_5_vl", "delta"), tmp_path / "out"))


def test_another_processor_is_no_checkpoint(saved, tmp_path, monkeypatch, leaves_nothing):
    right = rewrite_plan.copy_processor

    def wrong(source, target):
        right(source, target)
        file = target / "processor_config.json"
        file.write_text(file.read_text().replace("0.5", "0.25"))

    monkeypatch.setattr(rewrite_plan, "copy_processor", wrong)
    with leaves_nothing(), pytest.raises(ProofError, match="of the processor was not copied as it is"):
        compress(CompressArguments(saved("smolvlm", "full"), 2, tmp_path / "out"))


def test_raises_when_the_processor_is_not_the_models(tmp_path, leaves_nothing):
    source = save(tmp_path / "delta", "smolvlm", DELTA)
    file = source / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_seq_len": 5}))
    with (
        leaves_nothing(),
        pytest.raises(ValueError, match="delta cannot be run, as it is, on what its processor makes"),
    ):
        densify(DensifyArguments(source, tmp_path / "out"))


def test_raises_when_there_is_nothing_to_do(saved, tmp_path, leaves_nothing):
    delta, full = (saved("smolvlm", kind) for kind in ("delta", "full"))
    with leaves_nothing(), pytest.raises(ValueError, match="has no delta experts, so there is nothing to densify"):
        densify(DensifyArguments(full, tmp_path / "out"))
    for source, rank, said in ((delta, 4, "but delta experts"), (full, 40, r"expert_rank is 40, .* adds nothing")):
        with leaves_nothing(), pytest.raises(ValueError, match=said):
            compress(CompressArguments(source, rank, tmp_path / "out"))


# Compress


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_copies_are_compressed_exactly_and_come_back(family, tmp_path):
    dense = hosts.save(tmp_path / "dense", family)
    asked = {"text_experts": 4, "vision_experts": 3}
    asked |= {"connector_experts": 2} if hosts.HOSTS[family].has_connector else {}
    given = {"vlm_model": str(dense), "output_dir": str(tmp_path / "copies")}
    copies = upcycle(UpcycleArguments(**given, **asked))
    small = compress(CompressArguments(copies, 2, tmp_path / "small"))
    assert len(delta_experts(load(small))) == len(sparse_blocks(load(copies)))
    assert gap(logits(small, family), logits(copies, family)) <= LIMIT
    assert all(error["max"] == 0 for error in receipt(small)["weight_errors"].values())
    again = densify(DensifyArguments(small, tmp_path / "again"))
    states = [load(one).state_dict() for one in (copies, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert (again / "config.json").read_bytes() == (copies / "config.json").read_bytes()
    assert (again / "upcycle_receipt.json").read_bytes() == (copies / "upcycle_receipt.json").read_bytes()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_the_error_is_reported_and_falls_with_the_rank(saved, tmp_path, family):
    full, found = saved(family, "full"), []
    for rank in (2, 20):
        out = compress(CompressArguments(full, rank, tmp_path / f"rank{rank}"))
        written = receipt(out)
        assert len(written["weight_errors"]) == 2 * len(sparse_blocks(load(full)))
        assert written["gaps"]["informative"]["logits of a picture and text"] > 1e-3
        assert gap(logits(out, family), logits(full, family)) > 1e-3
        found.append([one["mean"] for one in written["weight_errors"].values()])
    assert all(first > second > 0 for first, second in zip(*found, strict=True))


# Plans, adapters, commands


@pytest.mark.parametrize("kind", ["densify", "compress"])
def test_experts_are_counted_by_part(saved, kind):
    source = saved("qwen2_5_vl", "delta" if kind == "densify" else "full")
    args = DensifyArguments(source) if kind == "densify" else CompressArguments(source, 4)
    plan = plan_rewrite(kind, args, open_checkpoint("it", source))
    model = plan.tensors.model
    for part, counts in (("text", (4, 2)), ("vision", (3, 1)), ("connector", (4, 2))):
        paths = tuple(f"{path}.experts." for path, _ in blocks_of(model, {part}))
        own = [one for one in plan.mapping.assignments if one.spec.name.startswith(paths)]
        assert own
        assert {(one.num_experts, one.num_active) for one in own} == {counts}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["delta", "full"])
def test_an_adapter_is_merged_first(saved, tmp_path, kind):
    source = saved("qwen2_5_vl", kind)
    adapted = load(source)
    adapted = get_peft_model(adapted, lora_config(adapted, lora_r=2))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    hosts.processor("qwen2_5_vl").save_pretrained(tmp_path / "adapter")
    processor, _ = load_processor(tmp_path / "adapter", "it", None)
    wanted = adapted.eval()(**hosts.inputs(processor, "qwen2_5_vl", (2,))).logits
    if kind == "delta":
        out = densify(DensifyArguments(tmp_path / "adapter", tmp_path / "out"))
    else:
        merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        wanted = logits(compress(CompressArguments(merged, 8, tmp_path / "again")), "qwen2_5_vl")
        out = compress(CompressArguments(tmp_path / "adapter", 8, tmp_path / "out"))
    assert gap(logits(out, "qwen2_5_vl"), wanted) <= LIMIT
    assert gap(logits(source, "qwen2_5_vl"), wanted) > 1e-2
    assert not list(tmp_path.glob(".vlmoe*"))


def test_the_commands_say_what_they_did(saved, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output

    monkeypatch.setattr(host_inputs, "process_video", lambda *_: None)
    said = run("densify", saved("qwen2_5_vl", "delta"), "--output-dir", tmp_path / "whole")
    assert "proved equal: largest gap" in said
    assert "not proved: " in said
    said = run("compress", saved("qwen2_5_vl", "full"), "--rank", 2, "--output-dir", tmp_path / "small")
    assert "model.visual.merger.mlp.experts.down_proj: relative error" in said
    assert "logits of a picture and text: " in said
    assert "not measured: " in said
    printed = preview_rewrite("densify", DensifyArguments(saved("qwen2_5_vl", "delta")))
    assert "sum     2 x model.visual.blocks.*.mlp.experts.down_proj [3, 24, 40]" in printed
