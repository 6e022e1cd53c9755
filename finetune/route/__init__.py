"""`vlmoe route CHECKPOINT DATA`: where a model sends its tokens, as numbers, figures and one page."""
