"""Several processes as one: the first decides, says and writes; the others take their share of the computing.

They are started by torchrun or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
A world of one, which is what there is without them, needs no process group and changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_streamline.errors import Dismissed, Interruption, StreamlineError, WorkerLost, reason

T = TypeVar("T")
# What tells a library that it is one of several processes: by the end, the first is alone and must not wait for others.
_MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass(eq=False)  # and so a default of other dataclasses
class World:
    """This process among `size`. Everything but `share` has to be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    local_rank: int = 0
    local_size: int = 1  # of this machine

    @classmethod
    @contextmanager
    def opened(cls, timeout: float) -> Iterator[World]:
        """The world that the launcher describes, until the block ends. Errors: WorkerLost."""
        rank, size, local = (
            int(os.environ.get(name, usual))
            for name, usual in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010", strict=True)
        )
        world = cls(rank, size, timeout, local, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        if size > 1:
            with world._watched():
                world._start()
            for name in _MARKS:
                os.environ.pop(name, None)
        try:
            yield world
        finally:
            world.close()

    def _start(self) -> None:
        """NCCL where every process of this machine has a GPU of its own; CPU tensors always go by gloo."""
        own_gpu = torch.cuda.device_count() >= self.local_size
        if own_gpu:
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that a lost worker is an error, not an abort
            torch.cuda.set_device(self.local_rank)
        backend = "cpu:gloo,cuda:nccl" if own_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, whole: Sequence[T] | Tensor) -> Any:
        """This process's contiguous part, of as many as the others have, or one more or less; it may be empty."""
        count = len(whole)
        return whole[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up, in place, what every process has. Errors: WorkerLost."""
        if self.size > 1:
            with self._watched():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """The first process's value, for all. Errors: WorkerLost."""
        if self.size == 1:
            return value
        box = [value]
        with self._watched():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def led(self, act: Callable[[], T]) -> T:
        """What `act` gives in the first process, for all. Errors: its own there, Dismissed in the others."""
        return self._told(act, lambda value: value)

    def alone(self, act: Callable[[], T]) -> T:
        """`act` in the first process; the others wait, get None, and end where it fails. Errors: as `led`."""
        return self._told(act, lambda _: None)

    def _told(self, act: Callable[[], T], news: Callable[[T], Any]) -> Any:
        if self.size == 1:
            return act()
        if not self.first:
            value, code = self.broadcast((None, None))
            if code is not None:
                raise Dismissed(code)
            return value
        try:
            value = act()
        except (Exception, Interruption) as error:
            self.broadcast((None, getattr(getattr(error, "stopped", error), "exit_code", 3)))
            raise
        self.broadcast((news(value), None))
        return value

    def attempt(self, act: Callable[[], T]) -> T:
        """What `act`, which asks nothing of the others, gives where none of them fails.

        Errors: the failure of whichever comes first, in the first process; Dismissed in the others.
        """
        if self.size == 1:
            return act()
        value, error = None, None
        try:
            value = act()
        except StreamlineError as caught:
            error = caught
        except Interruption as interruption:
            error = interruption.stopped
        failures: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(failures, error and (str(error), error.exit_code))
        if found := next((failure for failure in failures if failure), None):
            if not self.first:
                raise Dismissed(found[1])
            told = error or StreamlineError(found[0])
            told.exit_code = found[1]
            raise told
        return value  # type: ignore[return-value]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Errors: WorkerLost for what gloo and NCCL raise, each in its own way, where another does not answer."""
        try:
            yield
        except RuntimeError as error:  # of which DistBackendError and the store's errors are kinds
            cause = re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", reason(error))  # where in gloo's source it was
            raise WorkerLost(self.timeout, cause) from error

    def close(self) -> None:
        """From here on this process is alone; it keeps its rank."""
        if self.size > 1 and dist.is_initialized():  # a tracker may have ended it
            dist.destroy_process_group()
        self.size = self.local_size = 1


ALONE = World()


def sum_gradients(world: World, parameters: Iterable[nn.Parameter], extra: Tensor) -> Tensor:
    """Every process's gradients become the sum of all; returns the sum of `extra`, a few numbers, likewise.

    One collective over everything, not DistributedDataParallel: that wants a backward pass of every process in every
    step, which a short last step does not give it, and `extra` would be a second one. What no process has a gradient
    for keeps none, as the optimizer passes it over.
    """
    if world.size == 1:
        return extra
    parameters = list(parameters)
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=extra.device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sizes = [p.numel() for p in parameters]
    flat = torch.cat([*(gradient.flatten().float() for gradient in gradients), present, extra.float()])
    *summed, present, extra = world.sum_(flat).split([*sizes, len(parameters), len(extra)])
    for parameter, gradient, anywhere in zip(parameters, summed, present.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if anywhere else None
    return extra
