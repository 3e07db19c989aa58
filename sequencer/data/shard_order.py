"""The order in which ranks and their workers read the samples of shards.

The order of an epoch is a function of (seed, epoch), the number of ranks and the number of workers per rank. The shards
are shuffled; every worker reads a contiguous partition of the resulting sequence, so that no sample is read twice or
left out, and shuffles it within buffers of `data.shuffle_buffer` samples.
"""

import random
from collections.abc import Mapping

import numpy as np


class ShardOrder:
    """Which samples of an epoch one rank reads, and in which order.

    Each rank has a contiguous range of the sequence of all samples, divided into one partition per worker. Batches are
    dealt to workers round-robin: batch `n` of the rank is taken from partition `n % workers`.

    Args:
        starts: number of the first sample of every shard, and at the end the number of all samples.
        total: samples of an epoch over all ranks.
        batch_size: samples per batch of this rank.
        workers: loader processes of the rank; 0 counts as 1.
        seed: None keeps the order of the shards.
        buffer: samples that are shuffled together.
        salts: by epoch, a string that gives the epoch another order.
    """

    def __init__(
        self,
        starts: np.ndarray,
        total: int,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int | None = None,
        buffer: int = 1,
        salts: Mapping[int, str] | None = None,
    ) -> None:
        self.starts, self.seed, self.buffer, self.salts = starts, seed, buffer, salts or {}
        self.batch_size, self.workers = batch_size, max(workers, 1)
        first, last = rank * total // world_size, (rank + 1) * total // world_size
        self.length = last - first
        batches, rest = divmod(self.length, batch_size)
        turns = [len(range(worker, batches, self.workers)) for worker in range(self.workers)]
        sizes = [turn * batch_size for turn in turns]
        sizes[batches % self.workers] += rest  # the last batch
        self.bounds = [first, *(first + int(end) for end in np.cumsum(sizes))]  # of the partitions in the sequence
        self._epoch = -1
        self._shards, self._ends = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def buffer_of(self, index: int) -> tuple[int, int, int]:
        """The partition of the rank's sample `index`, the number of its buffer there, and its place in that buffer."""
        batch, within = divmod(index, self.batch_size)
        turn, partition = divmod(batch, self.workers)
        return partition, *divmod(turn * self.batch_size + within, self.buffer)

    def read_order(self, epoch: int, partition: int, number: int) -> np.ndarray:
        """Numbers of the samples of a buffer in the order in which they are read."""
        first = self.bounds[partition] + number * self.buffer
        places = np.arange(first, min(first + self.buffer, self.bounds[partition + 1]))
        shards, ends = self._sequence_of(epoch)
        turn = np.searchsorted(ends, places, side="right")
        return self.starts[shards[turn] + 1] - (ends[turn] - places)

    def serving_order(self, epoch: int, partition: int, number: int) -> np.ndarray:
        """Numbers of the samples of a buffer in the order in which they are served."""
        numbers = self.read_order(epoch, partition, number)
        if self.seed is None:
            return numbers
        return self._random(epoch, f"{self.bounds[partition]} {number}").permutation(numbers)

    def sample(self, epoch: int, index: int) -> int:
        """Number of the rank's sample `index`, counted in the order of its batches."""
        partition, number, place = self.buffer_of(index)
        return int(self.serving_order(epoch, partition, number)[place])

    def _sequence_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the number of samples up to the end of each."""
        if epoch != self._epoch:
            shards = np.arange(len(self.starts) - 1)
            if self.seed is not None:
                shards = self._random(epoch).permutation(shards)
            self._shards, self._ends = shards, np.cumsum(np.diff(self.starts)[shards])
            self._epoch = epoch
        return self._shards, self._ends

    def _random(self, epoch: int, purpose: str = "") -> np.random.RandomState:
        # NumPy promises never to change the stream of RandomState
        seed = f"{self.seed} {epoch} {self.salts.get(epoch, '')} {purpose}"
        return np.random.RandomState(random.Random(seed).getrandbits(32))
