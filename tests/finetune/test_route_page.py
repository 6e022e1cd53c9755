"""The page of `vlmoe route`: what is in it, that it is safe and the same each time, and that it works in a browser."""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from peft import get_peft_model
from PIL import Image

from modeling_vlmoe import cli
from modeling_vlmoe.finetune import load_chat_data, lora_config
from modeling_vlmoe.finetune.checkpoints import load_base
from modeling_vlmoe.finetune.route.explanations import MEASURES
from modeling_vlmoe.finetune.route.figures import FIGURES
from modeling_vlmoe.finetune.route.report import build_report
from modeling_vlmoe.finetune.route.route import label_sources, load_model, name_model, route
from modeling_vlmoe.finetune.route.run import RoutingRun, label_of
from modeling_vlmoe.finetune.route.settings import NUMBERS, PAGE, RouteSettings
from modeling_vlmoe.finetune.settings import FinetuneSettings
from tests.finetune.conftest import save_model
from tests.finetune.questions import question, write_rows

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = "<script>alert('x')</script> & \"quoted\" $x^2$"
VOID = {"meta", "link", "br", "img", "input", "hr", "path"}


class Page(HTMLParser):
    """The elements of a page: tag, attributes, and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "inside": [one["tag"] for one in self.open]} | dict(attrs)
        element["of"] = next((one["data-layer"] for one in reversed(self.open) if "data-layer" in one), None)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag, **wanted):
        names = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [
            one
            for one in self.elements
            if one["tag"] == tag and all(one.get(name) == value for name, value in names.items())
        ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Rows whose answers and texts are HTML, beside the pictures they are of."""
    folder = tmp_path_factory.mktemp("hostile")
    Image.new("RGB", (48, 24), (20, 20, 220)).save(folder / "blue.png")
    rows = [question(["blue.png"], HOSTILE, f"what? {HOSTILE}", "</style>"), question(["blue.png"], "blue", kind="b")]
    return write_rows(folder / "rows.jsonl", [*rows, question([], "four", "two and two?", "b")])


@pytest.fixture(scope="module")
def settings(base, pictures, hostile):
    def build(folder, **given):
        values = {"num_shown": 2, "layer": "1", "output_dir": str(folder)} | given
        return RouteSettings(str(base), [str(pictures / "train.jsonl"), str(hostile)], **values)

    return build


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    torch.set_num_threads(1)
    return route(settings(tmp_path_factory.mktemp("routed") / "out"))


@pytest.fixture(scope="module")
def text(folder):
    return (folder / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / NUMBERS).read_text(encoding="utf-8"))


LAYERS = ["vision/layer_1", "vision/layer_2", "connector", "text/layer_0", "text/layer_1", "text/layer_2"]


def test_the_folder_holds_page_figures_and_numbers(folder):
    assert {path.name for path in folder.iterdir()} == {PAGE, NUMBERS, *FIGURES}
    for name in FIGURES:
        assert min(Image.open(folder / name).size) > 200


def test_the_page_needs_nothing_else(text, page):
    assert not re.search(r"https?://", text)
    assert not page.find("link")
    assert not page.find("img")
    assert all("src" not in one and "href" not in one for one in page.elements)
    assert not [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("data:image/")]


def test_every_layer_can_be_chosen_and_is_there_without_a_script(page):
    assert [one["value"] for one in page.find("option")] == LAYERS
    assert [one["value"] for one in page.find("option") if "selected" in one] == ["text/layer_1"]
    panels = page.find("article")
    assert [one["data-layer"] for one in panels] == LAYERS
    assert not [one for one in panels if "hidden" in one]


def test_the_tables_hold_the_numbers(page, report):
    cells = Counter(one.get("title") for one in page.find("td"))
    for layer in report["layers"]:
        for load in layer["loads"]:
            assert sum(load["load"]) == pytest.approx(1, abs=1e-4)
            for expert, share in enumerate(load["load"]):
                assert cells[f"{layer['title']}, expert {expert}: {100 * share:.1f} %"] >= 1
    shown = page.find("section", id="overview")[0]["text"]
    for dataset in ("train.jsonl", "rows.jsonl"):
        for modality in ("Image", "Text"):
            assert f"{modality} tokens of {dataset}" in shown


def test_patches_are_coloured_by_their_expert(page, report):
    for layer in LAYERS:
        patches = [found for sample in report["samples"] for found in sample["patches"].get(layer, [])]
        drawings = [one for one in page.find("svg") if one["of"] == layer]
        assert len(drawings) == len(patches) == 4
        titles = [one["text"] for one in page.find("title") if one["of"] == layer]
        wanted = []
        for found in patches:
            counts = sorted(Counter(found["experts"]).items())
            wanted += [f"Expert {expert}: {count} of 9 patches" for expert, count in counts]
        assert titles == wanted
        assert all(one["viewbox"] == "0 0 3 3" and one["aria-label"] for one in drawings)


def test_the_area_of_a_path_is_its_patches(page):
    for path in page.find("path"):
        if "data-expert" in path:
            pieces = re.findall(r"M\d+ \d+h(\d+)v1h-(\d+)z", path["d"])
            assert "".join(re.findall(r"M\d+ \d+h\d+v1h-\d+z", path["d"])) == path["d"]
            assert all(one == other for one, other in pieces)


def test_tokens_are_coloured_in_layers_of_the_llm_alone(page, report):
    tokens = [one for one in page.find("span") if "token" in one.get("class", "").split()]
    assert {one["of"] for one in tokens} == {"text/layer_0", "text/layer_1", "text/layer_2"}
    own = [one for one in tokens if one["of"] == "text/layer_2"]
    wanted = [
        (token["text"], str(expert))
        for sample in report["samples"]
        for token, expert in zip(sample["tokens"], sample["experts"]["text/layer_2"], strict=True)
        if token is not None and token["text"]
    ]
    assert [(one["text"], one["data-expert"]) for one in own] == wanted


def test_what_comes_from_data_is_text(page, text, report):
    assert [one["label"] for one in report["samples"]].count(HOSTILE) == 1
    assert len(page.find("script")) == 1
    assert len(page.find("style")) == 1
    assert "<script>alert" not in text
    labels = [one["text"] for one in page.find("span", class_="label")]
    assert labels.count(HOSTILE) == len(LAYERS)


def test_everything_that_is_seen_has_words(page):
    for one in page.elements:
        if one.get("role") == "img":
            assert one["aria-label"].strip()
    for one in page.find("select"):
        assert page.find("label", for_=one["id"])
    assert [one["text"] for one in page.find("dt")] == [name.capitalize() for name in MEASURES]


def test_alarms_are_those_of_training(page, report):
    """A few tokens through routers that are not sure, and experts unlike: nothing is wrong."""
    assert report["alarms"] == []
    assert "None: no dead experts" in page.find("section", id="alarms")[0]["text"]


def test_the_same_model_and_data_give_the_same_files(folder, settings, tmp_path):
    again = route(settings(tmp_path / "again"))
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def numbers_of(folder, data, **given):
    """The numbers alone, and what the model is called."""
    settings = RouteSettings(str(folder), [str(data)], **given)
    model, processor = load_model(settings)
    run, label = RoutingRun(model, processor), partial(label_of, label_field=settings.label_field)
    run.add("a", load_chat_data(data, "train"), 4, 1, label)
    return build_report(run, name_model(str(folder)), [{"label": "a", "rows": 8}], settings)


def test_copies_are_an_alarm_and_a_field_labels(pictures, tmp_path):
    base = save_model(tmp_path / "model", connector_moe=None, vision_moe=None)
    model = load_base(str(base))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(parameter[:1].clone().expand_as(parameter))
    model.save_pretrained(base)
    written = numbers_of(base, pictures, label_field="kind")
    assert [(one["kind"], one["layer"]) for one in written["alarms"]] == [
        ("identical experts", f"text/layer_{index}") for index in range(3)
    ]
    assert "Experts still identical in layer 1 of the LLM" in written["alarms"][1]["words"]
    assert {sample["label"] for sample in written["samples"]} <= {"colour", "other", "pair", "text"}


def test_an_adapter_is_routed_as_its_merged_model(base, processor, pictures, tmp_path):
    model = load_base(str(base))
    adapted = get_peft_model(model, lora_config(model, FinetuneSettings(lora_r=2, lora_parts=["text", "vision"])))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "tuned")
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned" / "merged")
    for folder in (tmp_path / "tuned", tmp_path / "tuned" / "merged"):
        processor.save_pretrained(folder)
    adapter, whole = (numbers_of(folder, pictures) for folder in (tmp_path / "tuned", tmp_path / "tuned" / "merged"))
    assert adapter["layers"] == whole["layers"] != numbers_of(base, pictures)["layers"]
    assert [one["model"]["name"] for one in (adapter, whole)] == ["tuned", "tuned/merged"]


def test_sources_of_one_name_are_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").touch()
    found = label_sources([str(tmp_path / name / "test.jsonl") for name in ("a", "b")] + ["someone/data"])
    assert [one["label"] for one in found] == ["test.jsonl", "test.jsonl (2)", "someone/data"]


def refusals(base, dense_base, pictures, folder):
    (folder / "full").mkdir()
    (folder / "full" / "kept.txt").write_text("mine")
    (folder / "result").mkdir()
    (folder / "result" / PAGE).write_text("earlier")
    data = str(pictures / "test.jsonl")
    return [
        ([str(base)], "DATA"),
        ([str(base), data, "--output-dir", "full"], "kept.txt"),
        ([str(base), data, "--output-dir", "result"], "--force"),
        ([str(base), data, "--layer", "17"], "text/layer_2"),
        ([str(base), data, "--label-field", "colur"], "colur"),
        ([str(base), data, "--num-samples", "0"], "num_samples"),
        ([str(base), "nothing.jsonl"], "nothing.jsonl"),
        (["nobody/nothing", data], "nobody/nothing"),
        ([str(dense_base), data], "dense"),
    ]


def test_refusals_name_what_is_wrong(base, dense_base, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    for words, named in refusals(base, dense_base, pictures, tmp_path):
        monkeypatch.setattr("sys.argv", ["vlmoe", "route", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2, (words, said)
        assert named.lower() in said.lower(), (words, said)
    assert not (tmp_path / "routing").exists()
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"


def test_the_command_says_where_the_page_is(base, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["vlmoe", "route", str(base), str(pictures / "test.jsonl"), "--num-shown", "0"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert capsys.readouterr().out == f"routing/{PAGE}: open it in a browser; the numbers are in {NUMBERS}\n"


def browse(page, folder, *options):
    """Opens a file in a headless browser of its own; what it wrote, and what its console said."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={folder / 'profile'}",
            *options,
            page,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# What a user does: sees a layer, chooses another, then one expert of it.
USE = """<script>
const first = document.querySelector("article:not([hidden])");
document.documentElement.dataset.first = first.dataset.layer;
const chooser = document.getElementById("layer");
chooser.value = "vision/layer_2";
chooser.dispatchEvent(new Event("change"));
document.querySelector('article[data-layer="vision/layer_2"] .legend button[data-expert="1"]').click();
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; the page's DOM is checked without")
def test_a_browser_shows_the_chosen_layer_alone(text, tmp_path):
    used = tmp_path / "used.html"
    used.write_text(text.replace("</body>", USE), encoding="utf-8")
    dom, console = browse(f"{used.as_uri()}#connector", tmp_path, "--dump-dom")
    assert not console, console
    shown = Page(dom)
    assert shown.find("html")[0]["data-ready"] == "true"
    assert shown.find("html")[0]["data-first"] == "connector"
    panels = shown.find("article")
    assert [one["data-layer"] for one in panels if "hidden" not in one] == ["vision/layer_2"]
    assert [one["data-layer"] for one in panels if "single" in one["class"].split()] == ["vision/layer_2"]
    chosen = [one for one in shown.elements if "chosen" in (one.get("class") or "").split()]
    assert {one["data-expert"] for one in chosen} <= {"1"}
    drawn = [one for one in shown.find("path", data_expert="1") if one["of"] == "vision/layer_2"]
    assert len(chosen) == len(drawn)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed; the page's DOM is checked without")
def test_a_browser_draws_the_page(folder, tmp_path):
    picture = tmp_path / "page.png"
    _, console = browse((folder / PAGE).as_uri(), tmp_path, f"--screenshot={picture}", "--window-size=1240,2400")
    assert not console, console
    drawn = Image.open(picture).convert("RGB")
    assert drawn.size == (1240, 2400)
    colours = {colour for _, colour in drawn.getcolors(maxcolors=2**24)}
    assert {(246, 248, 250), (255, 255, 255), (0, 114, 178)} <= colours  # the ground, a card, the first expert
