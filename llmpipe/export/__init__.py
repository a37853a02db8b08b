"""Models for other engines: written, read back by who will use them, and held against the model.

ask         what a model in memory says to the questions of the probe
"""
