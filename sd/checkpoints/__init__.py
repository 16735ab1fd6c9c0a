"""Checkpoints: their files, formats, names and shapes, and what is wrong with them. sd/model_loader.py is the door."""
