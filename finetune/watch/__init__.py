"""What goes wrong first in a training: said at once, in words, with its figures and what to do."""
