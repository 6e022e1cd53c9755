"""Changes to the files of a folder that is to be pushed."""

import json


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
