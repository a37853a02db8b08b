"""Engines that draw a rollout: the policy itself, or a copy of it in vLLM."""
