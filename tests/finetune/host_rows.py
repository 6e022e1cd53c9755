"""Hosts with a chat template like those they ship, and rows of one, several and no pictures for them."""

from tests import hosts

IMAGE = {"type": "image"}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(family, text=CHATML):
    return text.replace("IMAGE", hosts.HOSTS[family].place)


def processor(family, text=CHATML):
    made = hosts.processor(family)
    made.chat_template = template(family, text)
    return made


def said(text):
    return {"type": "text", "text": text}


def row(number, images, *turns):
    """Turns of user and assistant, one after the other."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return {"messages": messages, "images": images, "row": number}


def mixed_rows():
    """Two pictures and another in a second turn, none, one; of unlike sizes."""
    several = row(
        1,
        [hosts.picture(1), hosts.picture(2, (70, 33)), hosts.picture(3, (32, 64))],
        [IMAGE, IMAGE, said(" what colour?")],
        "red\n\nand blue",
        [said("and now "), IMAGE],
        [said("the same: red")],
    )
    return [several, row(2, [], "two and two?", "four"), row(3, [hosts.picture(4)], [IMAGE, said(" where?")], "left")]
