"""How a model is spread over processes, and what these tell each other: the only place that knows.

Every process holds the whole model (one process alone, or several under DistributedDataParallel,
which Accelerate puts around it), or a part of each weight, of its gradient and its moments.

- `group`: how the processes of a launch become one group
- `world`: what they tell each other
- `tensors`: a tensor of which each process holds a part
- `parts`: a model that FSDP2 has cut, from its load to its end
- `shards`: its checkpoints, a file for each process
- `zero`: what DeepSpeed does to a model while it trains, and its checkpoints

Nothing else in llmpipe calls a collective of `torch.distributed` or knows of DTensors, FSDP2 and
DeepSpeed's engine. What speaks to the other processes has to be called by all of them, in one
order.
"""
