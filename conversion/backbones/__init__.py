"""Which backbones of transformers can be upcycled: found out by upcycling a tiny one of each family."""
