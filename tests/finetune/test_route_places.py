"""Where patches lie: what is painted on one place of an image changes the token that stands for that place."""

import pytest
import torch
from PIL import Image, ImageDraw

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune.checkpoints import load_base, open_processor
from modeling_vlmoe.finetune.collator import ChatCollator
from modeling_vlmoe.finetune.route.places import fit
from modeling_vlmoe.finetune.route.run import RoutingRun, answer_of
from modeling_vlmoe.image_tokens import find_image_tokens
from modeling_vlmoe.parts import find_towers
from modeling_vlmoe.routers import Router
from modeling_vlmoe.towers import tower_layers
from tests import hosts, models, variable_images
from tests.finetune.host_rows import IMAGE, row, said, template

WIDTH, HEIGHT = 96, 72
HOSTS = ("qwen2_5_vl", "smolvlm", "gemma3")


def composite(vision):
    """Sparse in all parts, with its processor."""
    processor = models.processor(vision)
    return models.sparse_model(vision=vision, image_token_id=processor.image_token_id), processor


def sparse_host(folder, family):
    dense = hosts.save(folder / "dense", family)
    (dense / "chat_template.jinja").write_text(template(family))
    connector = {"connector_experts": 2} if family == "qwen2_5_vl" else {}
    given = {"vlm_model": str(dense), "output_dir": str(folder / "sparse"), "text_experts": 4, "vision_experts": 3}
    made = upcycle(UpcycleArguments(**given, **connector))
    model = load_base(str(made))
    return model, open_processor(made, model.config)


def build(kind, folder):
    if kind in HOSTS:
        return sparse_host(folder, kind)
    if kind in variable_images.TOWERS:
        return variable_images.sparse_model(kind), variable_images.processor(kind)
    return composite(kind)


def questions(pictures):
    return [row(index + 1, [picture], [IMAGE, said(" where?")], "left") for index, picture in enumerate(pictures)]


class Inputs:
    """Keeps what each layer's router reads; of the LLM, where attention mixes more, what its first layer reads."""

    def __init__(self, model):
        self.seen, self.embeddings, self.handles = [], None, []
        text = find_towers(model.base_model)["text"][1]
        self.is_text = {module for module in text.modules() if isinstance(module, Router)}
        layer = tower_layers(text)[1][0]
        self.handles.append(layer.register_forward_pre_hook(self.keep_embeddings, with_kwargs=True))
        routers = [module for module in model.modules() if isinstance(module, Router)]
        self.handles += [router.register_forward_hook(self.keep) for router in routers]

    def keep_embeddings(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.embeddings = hidden.detach().flatten(0, 1).clone()

    def keep(self, module, args, output):
        self.seen.append(self.embeddings if module in self.is_text else args[0].detach().clone())

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def router_inputs(model, processor, rows):
    """What the routers read, in order, and the pass."""
    run = RoutingRun(model, processor, batch_size=len(rows))
    with Inputs(model) as seen:
        passed = run._run(rows, [None] * len(rows))
    return seen, passed


@pytest.mark.parametrize("kind", ["siglip", "clip", *variable_images.SPARSE_TOWERS, *HOSTS])
def test_a_painted_patch_changes_its_own_token_most(kind, tmp_path):
    model, processor = build(kind, tmp_path)
    noise = torch.randint(256, (HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, other = Image.fromarray(noise.numpy()), Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90))
    is_host = kind in HOSTS
    pictures = [plain] if is_host else [other, plain]
    before, passed = router_inputs(model, processor, questions(pictures))
    place = len(pictures) - 1
    layers = list(passed.routed)
    first = next(layer for layer in layers if layer[0] == "vision")
    grid = passed.places.grids(first, len(passed.routed[first].mask_T))[place]
    column, line = grid.columns - 2, 1
    tile = passed.places.pictures[place].image
    if tile.size == (WIDTH, HEIGHT) or not is_host:
        painted = plain.copy()
        if kind == "clip":  # cut from the middle
            left, size = (WIDTH - HEIGHT) / 2, HEIGHT
        else:
            left, size = 0, WIDTH
        box = [
            left + column * size / grid.columns + 2,
            line * HEIGHT / grid.rows + 2,
            left + (column + 1) * size / grid.columns - 3,
            (line + 1) * HEIGHT / grid.rows - 3,
        ]
        ImageDraw.Draw(painted).rectangle(box, fill=(255, 0, 255))
        after, _ = router_inputs(model, processor, questions([*pictures[:-1], painted]))
    else:  # a tile of it: painted where the ViT reads it
        after = paint_tile(model, processor, questions(pictures), place, grid, line, column)
    for layer, old, new in zip(layers, before, after, strict=True):
        tokens = len(passed.routed[layer].mask_T)
        images = passed.is_image.flatten().nonzero().flatten() if layer[0] == "text" else None
        own = passed.places.grids(layer, tokens, images)[place]
        joined = grid.rows // own.rows
        changed = (new - old).norm(dim=-1)[own.tokens]
        highest = changed.topk(2 if layer[0] == "text" else 1).indices  # behind a connector whose experts may change
        assert (line // joined) * own.columns + column // joined in highest, layer
        if layer == first and place:
            before_it = passed.places.grids(layer, tokens)[0].tokens
            assert changed.max() > 100 * (new - old).norm(dim=-1)[before_it].max()


def paint_tile(model, processor, rows, place, grid, line, column):
    """What the routers read when one patch of one tile is painted."""
    batch = ChatCollator(processor)([dict(one) for one in rows])
    batch.pop("labels")
    pixels = batch["pixel_values"]
    tiles = pixels.view(-1, *pixels.shape[-3:])
    high, wide = tiles.shape[-2] // grid.rows, tiles.shape[-1] // grid.columns
    tiles[place, :, line * high : (line + 1) * high, column * wide : (column + 1) * wide] = 3.0
    with Inputs(model) as seen, torch.no_grad():
        model(**batch)
    return seen


def test_queries_are_no_places():
    """What LLaVA-NeXT's LLM gets has line ends between its rows of patches: their places do not follow."""
    assert fit(9, (24, 24)) == (3, 3)
    assert fit(12, (30, 40)) == (3, 4)
    assert fit(10, (24, 24)) is None
    assert fit(7, (24, 24)) is None


@pytest.mark.parametrize("family", ["siglip2_vision_model", "qwen2_5_vl_vision"])
def test_rows_of_a_batch_are_counted_as_alone(family):
    """Images of unlike sizes, and a row without any: what each row sends where does not depend on its batch."""
    model, processor = variable_images.sparse_model(family), variable_images.processor(family)
    rows = [*questions(variable_images.pictures(((24, 24), (40, 16)))), row(3, [], "two and two?", "four")]
    found = []
    for batch_size in (3, 1):
        run = RoutingRun(model, processor, batch_size)
        run.add("a", rows, 3, 3, answer_of)
        found.append(run)
    together, alone = found
    assert together.tallies.keys() == alone.tallies.keys()
    for key, tally in together.tallies.items():
        assert tally.assigned_E.equal(alone.tallies[key].assigned_E), key
        assert {index: count.tolist() for index, count in tally.by_sample.items()} == {
            index: count.tolist() for index, count in alone.tallies[key].by_sample.items()
        }
    for one, other in zip(together.samples, alone.samples, strict=True):
        assert one.patches == {layer: other.patches.get(layer, []) for layer in one.patches}


def test_image_tokens_of_the_llm_are_those_of_the_mask():
    model, processor = composite("siglip")
    rows = questions(variable_images.pictures(((24, 24), (24, 24))))
    _, passed = router_inputs(model, processor, rows)
    tokens = find_image_tokens(model.model, passed.batch["input_ids"], None).flatten().nonzero().flatten()
    grids = passed.places.grids(("text", 0), passed.is_image.numel(), tokens)
    assert torch.cat([grid.tokens for grid in grids]).equal(tokens)
