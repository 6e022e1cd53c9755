"""`vlmoe data check`: goes over all rows of some data and counts what is wrong with them, in words."""
