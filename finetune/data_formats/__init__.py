"""The forms that rows of image-text data come in, and the files that hold them; one file per form.

`table.py` lists the forms, `containers.py` the files, `image_places.py` says where an image may lie, `faults.py` what
may be wrong, `mixtures.py` puts several sources together, and `streams.py` reads them row by row.
"""
