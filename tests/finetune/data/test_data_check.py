"""`vlmoe data check`: every kind of fault is counted and named, in all rows; exit code 2 where there is one."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modeling_vlmoe.finetune.data_check.check import check_data
from modeling_vlmoe.finetune.data_check.row_checks import RowCheck
from modeling_vlmoe.finetune.data_check.settings import DataCheckSettings
from modeling_vlmoe.finetune.data_formats.containers import RawRow
from modeling_vlmoe.finetune.data_formats.image_places import places_of
from modeling_vlmoe.finetune.data_formats.reading import RowReader
from modeling_vlmoe.finetune.host_chats import HostChats
from modeling_vlmoe.finetune.marked_chats import MarkedChats
from tests.finetune.data import forms
from tests.finetune.host_rows import processor as host_processor

BROKEN = b"\x89PNG\r\n\x1a\nnothing"


def said(question, answer="red", **columns):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **columns}


GOOD = [said("<image>\nwhich?", image="red.png"), said("two and two?", "four")]
# A row, and its faults without and with a model; a limit of sixty tokens.
WRONG = {
    "{": (["broken_rows"], None),
    "7": (["broken_rows"], None),
    json.dumps({"conversations": []}): (["no_messages"], None),
    json.dumps({"conversations": [{"from": "human", "value": "x"}]}): (["no_answer"], None),
    json.dumps({"conversations": [{"from": "human"}]}): (["broken_messages"], None),
    json.dumps({"conversations": [{"from": "robot", "value": "x"}]}): (["unknown_role"], None),
    json.dumps(said("x", tools="[f]")): (["other_form"], None),
    json.dumps(said("x", " ")): (["no_answer"], None),
    json.dumps(said("no place", image="red.png")): (["images_without_placeholder"], None),
    json.dumps(said("<image> none")): (["placeholders_without_image"], None),
    json.dumps(said("which?", "<image> it", image="red.png")): (["images_in_answers"], None),
    json.dumps(said("<image>", image="gone.png")): (["missing_images"], None),
    json.dumps(said("<image>", image="broken.png")): (["unreadable_images"], None),
    json.dumps(said("<image>", image="../outside.png")): (["images_outside_the_folder"], None),
    json.dumps(said("<image>", " ", image=["gone.png", "broken.png"])): (
        ["missing_images", "unreadable_images", "images_without_placeholder", "no_answer"],
        None,
    ),
    json.dumps(said("<image>" + "x" * 90, image="red.png")): ([], ["too_long"]),
    json.dumps(said("x", "<think>y</think>")): ([], ["nothing_to_learn"]),
}
COUNTS = {
    "broken_rows": 2,
    "other_form": 1,
    "no_messages": 1,
    "broken_messages": 1,
    "unknown_role": 1,
    "no_answer": 3,
    "images_without_placeholder": 2,
    "placeholders_without_image": 1,
    "images_in_answers": 1,
    "images_outside_the_folder": 1,
    "missing_images": 2,
    "unreadable_images": 2,
}
BY_MODEL = {"too_long": 1, "nothing_to_learn": 1}


@pytest.fixture
def folder(tmp_path):
    """data/ with its pictures and a broken one, beside outside.png."""
    data = tmp_path / "data"
    data.mkdir()
    forms.draw(data)
    (data / "broken.png").write_bytes(BROKEN)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    return data


def write(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder / name


def check(*data, **given):
    return check_data(DataCheckSettings([str(one) for one in data], **given))


@pytest.mark.parametrize("row", WRONG, ids=lambda row: "-".join(WRONG[row][0] or WRONG[row][1]))
def test_each_fault_is_found(row, folder, base):
    without, with_model = WRONG[row]
    path = write(folder, [*GOOD, row])
    (tally,) = check(path)
    assert dict(tally.counts) == dict.fromkeys(without, 1)
    assert (tally.num_rows, tally.num_faulty_rows) == (3, int(bool(without)))
    if with_model is not None:
        (tally,) = check(path, model=str(base), max_length=60)
        assert list(tally.counts) == with_model
    for told in tally.shown.values():
        assert all(where == "row 3" and message.startswith("row 3") for where, message in told)


def test_all_faults_are_counted_and_the_command_ends_with_2(folder, base, vlmoe_here):
    path = write(folder, [*GOOD, *WRONG])
    done = vlmoe_here("data", "check", path, "--json")
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    (found,) = report["data"]
    assert {kind: told["count"] for kind, told in found["faults"].items()} == COUNTS
    assert report["faults"] == sum(COUNTS.values())
    assert (found["rows"], found["faulty_rows"]) == (19, 15)
    assert found["faults"]["missing_images"]["first"][0]["row"] == "row 14"
    done = vlmoe_here("data", "check", path, "--model", base, "--max-length", 60)
    assert done.returncode == 2
    assert "  rows that are too long: 1\n    row 18 is " in done.stdout
    assert f"  faults: {sum(COUNTS.values()) + sum(BY_MODEL.values())}, in 17 rows" in done.stdout


def test_clean_data_are_told_of_and_the_command_ends_with_0(folder, base, vlmoe_here):
    path = write(folder, [*GOOD, *GOOD, said("<image><image>both?", "blue", image=["red.png", "blue.png"])])
    done = vlmoe_here("data", "check", path, "--model", base)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[0] == (
        "rows.jsonl: 5 rows of the form llava, 4 images, 5 answers; 2 rows of text alone (40%)"
    )
    assert "tokens of a row: " in done.stdout
    assert "(limit 256)" in done.stdout
    assert "note: rows that say and show what an earlier one does: 2" in done.stdout
    assert done.stdout.endswith("  no fault\n")


def test_lengths_are_those_of_the_batch(folder, base, processor):
    from modeling_vlmoe.finetune import ChatCollator, load_chat_data

    path = write(folder, GOOD)
    lengths = ChatCollator(processor)(list(load_chat_data(path)))["attention_mask"].sum(-1).tolist()
    (tally,) = check(path, model=str(base))
    assert tally.lengths == lengths
    assert tally.percentiles()["most"] == max(lengths)


def test_an_images_token_in_a_text_is_a_fault_with_a_model(folder, base, processor):
    token = processor.image_token
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": f"a {token} b"}]}]}
    row["messages"].append({"role": "assistant", "content": "c"})
    path = write(folder, [row])
    assert check(path)[0].num_faults == 0
    assert dict(check(path, model=str(base))[0].counts) == {"image_token_in_text": 1}


class Miscounted(MarkedChats):
    """A processor that says otherwise how many tokens an image has."""

    def count_tokens(self, row):
        return super().count_tokens(row) - 1


def test_images_with_another_number_of_tokens_are_a_fault(folder, processor):
    reader = RowReader("llava", places_of(str(write(folder, GOOD))), "")
    found = RowCheck(reader, Miscounted(processor))(RawRow(1, "row 1", GOOD[0]))
    assert [fault.kind for fault in found.faults] == ["token_mismatch"]
    assert RowCheck(reader, MarkedChats(processor))(RawRow(1, "row 1", GOOD[0])).faults == []


@pytest.mark.parametrize("kind", forms.FILES)
def test_every_kind_of_file_is_checked(kind, tmp_path):
    rows = [forms.as_messages(talk) for talk in forms.TALKS]
    (tally,) = check(forms.write(kind, tmp_path, rows))
    assert (tally.num_rows, tally.num_images, tally.num_answers, tally.num_faults) == (4, 5, 6, 0)
    assert tally.form == "messages"


def test_faults_in_tars_and_parquet_name_their_rows(tmp_path):
    forms.draw(tmp_path)
    rows = [forms.as_messages(forms.ONE), forms.as_messages(forms.ONE) | {"images": []}]
    (in_tar,) = check(forms.write_tar(tmp_path, rows))
    assert in_tar.shown["placeholders_without_image"][0][0] == "row 2 (0001)"
    (in_parquet,) = check(forms.write_parquet(tmp_path, rows))
    assert in_parquet.shown["placeholders_without_image"][0][0] == "row 2"


def test_images_that_no_row_of_an_imagefolder_names_are_told_of(tmp_path):
    (tmp_path / "train").mkdir()
    forms.draw(tmp_path / "train")
    rows = [json.dumps({"file_name": f"{name}.png", "caption": name}) for name in ("red", "blue")]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(rows))
    (tally,) = check(tmp_path)
    assert (tally.num_rows, tally.num_faults, tally.num_unnamed_images) == (2, 0, 1)
    assert "  note: images in the folder that no row names: 1" in tally.lines()


def test_what_a_chat_template_does_not_take_is_a_fault(folder):
    chats = HostChats(host_processor("qwen2_vl", "{{ raise_exception('no') }}"))
    found = RowCheck(RowReader("llava", places_of(str(folder)), ""), chats)(RawRow(1, "row 1", GOOD[1]))
    assert [fault.kind for fault in found.faults] == ["not_rendered"]
    assert str(found.faults[0]).startswith("row 1: the chat template of the processor")


def test_several_data_are_told_apart(folder, tmp_path):
    (tmp_path / "more").mkdir()
    good, bad = write(folder, GOOD), write(tmp_path / "more", ["{"])
    first, second = check(good, bad)
    assert (first.name, first.num_faults) == ("rows.jsonl", 0)
    assert (second.name, second.num_faults, second.num_rows) == ("rows.jsonl (2)", 1, 1)


def test_the_first_rows_alone_where_that_is_asked_for(folder):
    (tally,) = check(write(folder, [*GOOD, "{"]), max_rows=2)
    assert (tally.num_rows, tally.num_faults, tally.is_cut) == (2, 0, True)
    assert "(the first ones alone)" in tally.lines()[0]


def test_image_folder_and_form_are_taken(folder, tmp_path):
    path = write(tmp_path, [{"image": "red.png", "question": "a", "answer": "b", "caption": "c"}])
    (tally,) = check(path, image_folder=str(folder), data_format="captions")
    assert (tally.form, tally.num_faults) == ("captions", 0)
    assert dict(check(path, data_format="captions")[0].counts) == {"missing_images": 1}


def test_an_adapter_stands_for_its_model(arguments, folder, tmp_path):
    from modeling_vlmoe.finetune import finetune

    adapter = finetune(arguments(max_steps=1, output_dir=str(tmp_path / "out"), save_strategy="no"))
    (tally,) = check(write(folder, GOOD), model=str(adapter))
    assert (tally.limit, len(tally.lengths), tally.num_faults) == (256, 2, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There are no DATA to check; name one source"),
        (["nowhere.jsonl"], "Cannot load the data nowhere.jsonl"),
        (["{empty}"], "hold no rows; give one"),
        (["{rows}", "--max-length", "9"], "max_length is in tokens, which only a model counts; give --model"),
        (["{rows}", "--max-rows", "0"], "max_rows is 0; expected 1"),
        (["{rows}", "--format", "coco"], "data_format is 'coco'; expected one of"),
        (["{rows}", "--format", "vqa"], "data_format is vqa; expected"),
        (["{rows}", "--model", "{folder}"], "has no config.json"),
    ],
)
def test_raises_when_there_is_nothing_to_check(words, message, folder, vlmoe_here):
    known = {"folder": folder, "rows": write(folder, GOOD), "empty": write(folder, [], "empty.jsonl")}
    done = vlmoe_here("data", "check", *(word.format(**known) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vlmoe: ")
    assert message in done.stderr


def test_rows_that_end_with_the_user_are_told_of(folder):
    row = said("a", "b")
    row["conversations"].append({"from": "human", "value": "and now?"})
    (tally,) = check(write(folder, [*GOOD, row]))
    assert (tally.num_faults, tally.as_dict()["rows_without_a_last_answer"]) == (0, 1)
    assert any("not the assistant's, which vlmoe evaluate refuses: 1" in line for line in tally.lines())


def large_text(folder):
    """A picture with a compressed text beyond what Pillow unpacks."""
    info = PngInfo()
    info.add_text("a", "a" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "text.png", pnginfo=info)
    return "text.png"


def broken_ppm(folder):
    (folder / "broken.ppm").write_bytes(b"P6\n8 x\n255\n")
    return "broken.ppm"


@pytest.mark.parametrize("draw", [large_text, broken_ppm])
def test_an_image_that_pillow_refuses_by_a_value_error_is_counted(draw, folder):
    (tally,) = check(write(folder, [said("<image>", image=draw(folder))]))
    assert dict(tally.counts) == {"unreadable_images": 1}
    assert tally.shown["unreadable_images"][0][1].startswith("row 1: cannot read the image")
