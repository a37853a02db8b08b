"""Proximal policy optimization of language models: `algorithm` has the equations, `rollout` draws answers, `actors` are
the models, `rewards` score, and `loop` is one update after the other."""
