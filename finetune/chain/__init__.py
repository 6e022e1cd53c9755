"""Stages that follow one another: each trains or converts what the one before it wrote."""
