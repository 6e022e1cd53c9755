"""`vlmoe classify`: a classifier of images and text, whose image experts are routed by the text, and its controls."""
