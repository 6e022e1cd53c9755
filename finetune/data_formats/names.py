"""The names of the forms of rows, and what each looks like. No torch here: help reads them."""

AUTO = "auto"
LOOKS = {
    "messages": "messages of role and content, images",
    "llava": "conversations of human and gpt, image",
    "sharegpt": "conversations of from and value, images",
    "vqa": "image, question, answer or answers",
    "captions": "image, caption",
    "labels": "image, label; a folder of one folder per class",
}
OURS = ("row", "data_file")  # columns that say where a row comes from
FORMAT_NAMES = (AUTO, *LOOKS)
CAPTION_QUESTION = "Describe the image briefly."
LABEL_QUESTION = "What does the image show?"
