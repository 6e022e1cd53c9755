"""Rows of chat data, as a user would write them."""

import json


def question(images, answer, text="which colour?", kind="colour"):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": images, "kind": kind}


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
