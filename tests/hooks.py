"""Faults put into a trial: a kill, a signal, NaN or a full disk at one exact moment."""

import errno
import os
import re
import signal
import sys


def __getattr__(name):
    """`kill_after_checkpoint_6` is `kill_after_checkpoint` with 6; `one__other` is both."""
    if "__" in name.strip("_"):
        return lambda: [getattr(sys.modules[__name__], each)() for each in name.split("__")]
    found = re.fullmatch(r"(.+?)_(\d+)", name)
    if not found or found[1] not in globals():
        raise AttributeError(name)
    return lambda: globals()[found[1]](int(found[2]))


def _after(owner, name, action):
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        action(*args, **kwargs)
        return out

    setattr(owner, name, wrapped)


def _before(owner, name, action):
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def kill_after_checkpoint(step):
    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _after(hosted.Durable, "_save_checkpoint", action)


def kill_in_save(step):
    """When the library has pickled its arguments beside the model."""
    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _before(hosted.Durable, "_save_rng_state", action)


def _before_file(step, number, act):
    """`act` with the path of the last of so many files that a process writes of a checkpoint."""
    from llmpipe.training.host_copy import File

    paths = []

    def action(self):
        if f"step-{step}." in str(self.path):
            paths.append(self.path)
            if len(paths) == number:
                act(self.path)

    _before(File, "write", action)


def kill_in_writing(step):
    """When a process has written one of its files, and not the next."""
    _before_file(step, 2, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def slow_writing(hundredths):
    """Each file takes so long, at least, that is written beside steps."""
    import threading
    import time

    from llmpipe.training.host_copy import File

    def action(_):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(hundredths / 100)

    _before(File, "write", action)


def kill_in_part(step):
    """When a process is about to write its part of a model."""
    _before_file(step, 1, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def disk_full_at(step):
    """When a process has written one of its files."""
    _before_file(step, 2, _disk_is_full)


def disk_full_in_parts(step):
    """When a process is about to write its part of a model."""
    _before_file(step, 1, _disk_is_full)


def _disk_is_full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _signal_in_step(step, number):
    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)

    _before(hosted.Durable, "training_step", action)


def kill_now():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_once_met():
    """When all processes have come, and before they are a group."""
    from llmpipe.front import outside

    _after(outside, "_peers", kill_now)


def stop_in_step(step):
    """It closes no connection, and answers nobody: as a machine without power."""
    _signal_in_step(step, signal.SIGSTOP)


def miss_after(times):
    """Others are missed sooner."""
    from llmpipe import peers

    peers.SILENCE = times


def kill_in_step(step):
    _signal_in_step(step, signal.SIGKILL)


def _after_hundredths(hundredths, number):
    """One of several is missed from then on when the others have heard of it; before, only its
    launcher knows of it, and these trials have none."""
    import threading

    timer = threading.Timer(hundredths / 100, os.kill, (os.getpid(), number))
    timer.daemon = True
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return timer.start()
    from llmpipe.peers import Peers

    _after(Peers, "watch", lambda *_: timer.start())


def kill_after_hundredths(hundredths):
    """Wherever it is by then."""
    _after_hundredths(hundredths, signal.SIGKILL)


def term_after_hundredths(hundredths):
    _after_hundredths(hundredths, signal.SIGTERM)


def _at_tenth(tenth, number):
    """Within a step, or in what follows it: after so many tenths of one."""
    import threading
    import time

    from llmpipe.training import hosted

    began = []

    def action(self, *_):
        now = time.monotonic()
        began.append((self.state.global_step, now))
        step, part = divmod(tenth, 10)
        if self.state.global_step == step and len([at for at, _ in began if at == step]) == 1:
            last = now - next((then for at, then in began if at == step - 1), now - 0.1)
            timer = threading.Timer(last * part / 10, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    _before(hosted.Durable, "training_step", action)


def kill_at_tenth(tenth):
    _at_tenth(tenth, signal.SIGKILL)


def term_at_tenth(tenth):
    _at_tenth(tenth, signal.SIGTERM)


def kill_in_publish():
    """When an adapter is saved and nobody has looked at it yet."""
    from llmpipe.models import publish

    _before(publish, "compare_adapter_on_parts", lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def crash_in_step(step):
    _signal_in_step(step, signal.SIGSEGV)


def memory_ends_in_step(step):
    """`ulimit -v` of what there is already: the next large allocation fails."""
    import resource

    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step - 1:
            with open("/proc/self/statm") as file:
                taken = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
            bytearray(1 << 30)

    _before(hosted.Durable, "training_step", action)


def bug_in_step(step):
    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step - 1:
            raise KeyError("forgotten")

    _before(hosted.Durable, "training_step", action)


def term_in_step(step):
    _signal_in_step(step, signal.SIGTERM)


def int_in_step(step):
    _signal_in_step(step, signal.SIGINT)


def term_in_evaluation():
    from llmpipe.training import hosted

    original = hosted.Durable.evaluate

    def evaluate(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    hosted.Durable.evaluate = evaluate


def term_in_save(step):
    from llmpipe.training import hosted

    def action(self, *_):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    _before(hosted.Durable, "gather_state", action)


def term_in_prepare():
    from llmpipe.data import prepare

    _before(prepare, "prepare", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))


def nan_loss(step):
    from trl import DPOTrainer, KTOTrainer, RewardTrainer

    from llmpipe.training.supervised import SupervisedTrainer

    for trainer in (SupervisedTrainer, RewardTrainer, DPOTrainer, KTOTrainer):

        def compute_loss(self, model, inputs, *args, original=trainer.compute_loss, **kwargs):
            loss = original(self, model, inputs, *args, **kwargs)
            return (
                loss * float("nan")
                if self.state.global_step == step - 1 and model.training
                else loss
            )

        trainer.compute_loss = compute_loss


def nan_gradient(step):
    from transformers import Trainer

    original = Trainer._clip_grad_norm

    def clip(self, model):
        if self.state.global_step == step - 1:
            next(model.parameters()).grad[0] = float("inf")
        return original(self, model)

    Trainer._clip_grad_norm = clip


def never_in_parts_again():
    """What only looked at a model in parts leaves its last weights whole."""
    from llmpipe.parallel import parts

    parts.reshard = lambda model: None


def says_what_is_in_parts():
    """After each micro-batch: of what learns, of its gradients and its moments; and what of it is
    offloaded.
    """
    from torch.distributed.tensor import DTensor

    from llmpipe.parallel.parts import _groups
    from llmpipe.training import hosted

    def action(self, *_):
        model = self.training.model
        parts = [part for group in _groups(model) for part in group.fsdp_params]
        offloaded = [part for part in parts if part.offload_to_cpu and not part.pin_memory]
        count = len({id(part.sharded_param) for part in offloaded})  # tied ones are two parts
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        states = self.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        held = [*weights, *(weight.grad for weight in weights), *moments]
        assert all(isinstance(each, DTensor) and each.to_local().is_cpu for each in held)
        assert not any(part.unsharded_accumulated_grad is not None for part in parts)
        print(f"in parts: {len(weights)} weights, {count} offloaded; {len(moments)} moments")

    _after(hosted.Durable, "training_step", action)


def small_machine():
    """This process's has less memory than the others'."""
    from llmpipe.run import machine

    machine.memory = lambda: 1 << 28


def another_stage_of_zero():
    """What the engine is configured for is not what was asked for."""
    from llmpipe.parallel import zero

    original = zero.Zero.config

    def config(self):
        asked = original(self)
        asked["zero_optimization"]["stage"] = 1
        return asked

    zero.Zero.config = config


def says_what_zero_holds():
    """At the end of a step: of what learns, of how many numbers a process holds weights and moments
    of its own. And what a layer computes by, then and at the end.
    """
    import torch

    from llmpipe.parallel import zero
    from llmpipe.training import hosted

    def action(self, *_):
        model, engine = self.training.model, self.model_wrapped
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        parts = zero._parts(engine)
        state = engine.optimizer.optimizer.state
        held = sum(getattr(weight, "ds_tensor", weight).numel() for weight in weights)
        kept = [state[part].get(key) for part in parts for key in zero.MOMENTS]
        moments = sum(moment.numel() for moment in kept if moment is not None)
        numbers = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
        print("by", torch.nn.functional.linear.__name__)
        print(f"of {numbers} numbers: {held} weights, {moments} moments, {engine.dp_world_size}")

    _after(hosted.Durable, "training_step", action)
    _after(hosted.Durable, "fit", lambda _: print("by", torch.nn.functional.linear.__name__))


def disk_full_in_publish():
    """When the process that writes has written a part of what it publishes."""
    from llmpipe.models import publish

    def action(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _before(publish, "same_tensors", action)
    _before(publish, "_save_adapter", action)


def kill_in_stream():
    """When some of what is published has been gathered."""
    from llmpipe.models import publish

    original = publish.whole_tensors

    def whole_tensors(model):
        for number, named in enumerate(original(model)):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield named

    publish.whole_tensors = whole_tensors


def another_part():
    """What one process reads of a published model is not what it has."""
    from llmpipe.models.verify import model as verified

    original = verified.load_model

    def load_model(*arguments, **options):
        import torch

        model = original(*arguments, **options)
        with torch.no_grad():
            next(model.parameters()).to_local()[0] += 1e-3
        return model

    verified.load_model = load_model


def _after_batches(count, act):
    """Do `act` instead of keeping a batch of an evaluation, after `count` were kept."""
    from llmpipe.evaluation.book import Book

    original, kept = Book.add, []

    def add(self, lines):
        if len(kept) == count:
            act(self, lines)
        kept.append(1)
        original(self, lines)

    Book.add = add
    return kept


def kill_after_three_batches():
    _after_batches(3, lambda book, lines: os.kill(os.getpid(), signal.SIGKILL))


def kill_inside_a_line():
    """One batch is kept, and of the next one the middle of a line."""

    def half(book, lines):
        with book.path.open("a", encoding="utf-8") as file:
            file.write(lines[0].text()[:40])
        os.kill(os.getpid(), signal.SIGKILL)

    _after_batches(1, half)


def count_batches():

    from llmpipe.evaluation.book import Book

    kept, original = _after_batches(-1, None), Book.close

    def close(self, *args):
        print(f"batches scored: {len(kept)} ")
        original(self, *args)

    Book.close = close


def ppo_kill_after(step):
    from llmpipe.rl.loop import Loop

    _after(
        Loop,
        "save",
        lambda self, **_: os.kill(os.getpid(), signal.SIGKILL) if self.state.step == step else None,
    )


def ppo_vllm_kill_after(step):
    """Where a double for vLLM draws, and sleeps."""
    from llmpipe.rl.rollout import vllm
    from tests.rl.rollout import fake

    sys.modules["vllm"] = fake.module()
    vllm.SLEEPS = {"cpu"}
    ppo_kill_after(step)


def ppo_term_in(step):
    from llmpipe.rl.learner import Learner

    _before(
        Learner,
        "learn",
        lambda self, at, *_: os.kill(os.getpid(), signal.SIGTERM) if at == step - 1 else None,
    )


def ppo_term_in_save(step):
    from llmpipe.rl.loop import Loop

    _before(
        Loop,
        "save",
        lambda self, **_: os.kill(os.getpid(), signal.SIGTERM) if self.state.step == step else None,
    )


def ppo_nan_loss(step):
    from llmpipe.rl.learner import Learner

    def action(self, at, *_):
        if at == step - 1:
            gradients = self._gradients
            self._gradients = lambda *given: gradients(*given) * float("nan")

    _before(Learner, "optimizer_step", action)


def ppo_nan_gradient(step):
    from llmpipe.rl.learner import Learner

    def action(self, at, *_):
        if at == step - 1:
            gradients = self._gradients

            def broken(*given):
                sums = gradients(*given)
                next(iter(self.weights.values())).grad[0] = float("inf")
                return sums

            self._gradients = broken

    _before(Learner, "optimizer_step", action)


class Plenty:
    """A gauge of a device that is never full."""

    def room(self):
        return 1e15

    def held(self):
        return 0.0

    def begin(self):
        pass

    def peak(self):
        return 0.0


def short_of_memory(most):
    """A machine on which no more than `most` sequences are passed at once; 0: where none is
    missed."""
    import torch

    from llmpipe.training import memory

    memory.DEVICES = {"cpu", "cuda"}
    memory.GAUGE = Plenty()
    passed = memory._pass

    def too_much(trainer):
        passed(trainer)
        if most and trainer.hardware.micro_batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    memory._pass = too_much


def memory_for(most):
    """A machine on which a pass of more than `most` sequences is seen to have taken more than there
    is, though no allocation failed. Prints what is passed."""
    from llmpipe.training import memory

    passed = memory._pass

    class Measured(Plenty):
        size = 0

        def peak(self):
            return 1.0 if self.size <= most else 2 * self.room()

    def told(trainer):
        memory.GAUGE.size = trainer.hardware.micro_batch_size
        print(f"passing {memory.GAUGE.size}")
        passed(trainer)

    memory.DEVICES, memory.GAUGE, memory._pass = {"cpu", "cuda"}, Measured(), told


def killed_when_short(most):
    short_of_memory(most)
    kill_after_checkpoint(3)


def ppo_short_of_memory(most):
    """A machine whose memory is enough for passes of so many tokens."""
    import torch

    from llmpipe.rl import fitting
    from llmpipe.rl.grpo import GRPO
    from llmpipe.rl.ppo import PPO

    def short(learn):
        def too_much(self, chosen, total):
            metrics = learn(self, chosen, total)
            if sum(each.episode.tokens for each in chosen) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return metrics

        return too_much

    fitting.DEVICES = {"cpu", "cuda"}
    PPO.learn, GRPO.learn = short(PPO.learn), short(GRPO.learn)


def ppo_killed_when_short(most):
    ppo_short_of_memory(most)
    ppo_kill_after(2)


def ppo_whole_before_the_optimizer():
    """What looks at a model before the first step does not put it back."""
    from llmpipe.rl import loop

    def action(ground, *_):
        for unit in ground.actors.causal.modules():
            if hasattr(unit, "unshard"):
                unit.unshard()

    _before(loop, "Learner", action)


def ppo_counted_reads():
    """Say what the host reads in each optimizer step."""
    from llmpipe.rl.learner import Learner
    from tests.rl.reads import counted

    step = Learner.optimizer_step

    def counting(self, *arguments):
        with counted() as reads:
            out = step(self, *arguments)
        print(f"reads: {reads}")
        return out

    Learner.optimizer_step = counting


def two_machines():
    """Half of the processes are taken to be on another machine, which has parts of its own."""
    from llmpipe.run import strategy

    strategy.machines = lambda processes: 2


def two_machines_and_term_in_step(step):
    two_machines()
    term_in_step(step)


def _at_arrival(number, action):
    """Before so many files that another machine sends, the first is 1, are written."""
    from llmpipe import mirror

    arrived = []

    def count(path, *_):
        arrived.append(path)
        if len(arrived) == number:
            action(path)

    _before(mirror, "_write", count)


def kill_at_arrival(number):
    """In the middle of a transfer."""
    _at_arrival(number, lambda path: kill_now())


def full_at_arrival(number):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    _at_arrival(number, full)
