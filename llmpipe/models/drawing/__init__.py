"""Responses of a model, a token at a time: on a CPU, and with recorded steps on a GPU."""
